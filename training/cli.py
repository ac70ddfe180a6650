"""Flags of train.py."""
import argparse

import models
import networks
from common import cli, distributed
from common.errors import ArgumentError
from data.builtin import BUILTIN_DATASETS
from training import fsdp
from training.objective import FLOW_DEFAULTS, OBJECTIVES
from transport import LOSS_WEIGHTS, PATHS, PREDICTIONS, TIME_DISTRIBUTIONS

# Defaults for flags that are not typed, by data set: its format, and for the digits a small model and its recipe.
DIGITS = BUILTIN_DATASETS["digits"] | dict(vae="none", num_workers=0)
DIGITS_MODEL = dict(model="DiT-S/2", depth=4, hidden_size=96, num_heads=4, global_batch_size=64, lr=4e-3,
                    ema_decay=[0.997], epochs=136, ckpt_every=1000)
FRACTALS = BUILTIN_DATASETS["fractals"] | dict(vae="none")


def build_parser(description=None):
    """Build the parser of train.py; every default is the paper's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=cli.HelpFormatter)
    _add_data_flags(parser.add_argument_group("data"))
    _add_network_flags(parser.add_argument_group("model").add_argument)
    _add_optimization_flags(parser.add_argument_group("optimization").add_argument)
    _add_objective_flags(parser.add_argument_group("objective").add_argument)
    _add_speed_flags(cli.add_compute_flags(parser).add_argument)
    _add_output_flags(parser.add_argument_group("results").add_argument)
    _add_evaluation_flags(parser.add_argument_group("evaluation").add_argument)
    _add_fault_flags(parser.add_argument_group("faults").add_argument)
    for alias, flag in (("--features-in-memory", "--cache-on-device"), ("--override", "--allow-config-change"),
                        ("--timeout", "--dist-timeout")):
        cli.add_alias(parser, alias, flag)
    return parser


def _add_data_flags(group):
    add, source = group.add_argument, group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="folder with one folder of images per class, or: digits, fractals")
    source.add_argument("--features-path", help="latent cache made by extract_features.py, instead of images")
    add("--image-size", type=cli.positive_int, default=256, help="image size in pixels")
    add("--num-classes", type=cli.positive_int, default=1000, help="number of classes in the model")
    add("--vae", type=cli.path_or_name, default="ema",
        help="ema, mse, a diffusers directory or hub name, or none (pixels)")
    add("--flip", action=argparse.BooleanOptionalAction,
        help="random horizontal flips (default: yes, except for digits and fractals)")
    add("--num-workers", type=cli.non_negative_int, default=4, help="data loading processes per rank")
    add("--cache-on-device", action="store_true", help="keep the latent cache in GPU memory")
    add("--max-bad-images", type=cli.non_negative_int, default=0,
        help="number of unreadable images to tolerate; each is replaced by another one")


def _add_network_flags(add):
    add("--model", choices=models.DiT_models, default="DiT-XL/2", help="model size and patch size")
    add("--depth", type=cli.positive_int, help="number of blocks, instead of the model's")
    add("--hidden-size", type=cli.positive_int, help="width, instead of the model's")
    add("--num-heads", type=cli.positive_int, help="attention heads, instead of the model's")
    add("--patch-size", type=cli.positive_int, help="patch size in latents, instead of the model's")
    add("--conditioning", choices=networks.CONDITIONINGS, default="adaln-zero", help="block type")
    add("--class-dropout-prob", type=cli.fraction, default=0.1, help="label dropout for guidance; 0: no null class")
    add("--learn-sigma", action=argparse.BooleanOptionalAction, default=True,
        help="outputs for the variance, which flow matching ignores")


def _add_optimization_flags(add):
    add("--epochs", type=cli.positive_int, default=1400, help="number of passes over the data")
    add("--max-steps", type=cli.positive_int, help="number of steps, if that is less than --epochs")
    add("--global-batch-size", type=cli.positive_int, default=256, help="images per step, over all ranks")
    add("--global-seed", type=cli.non_negative_int, default=0, help="random seed")
    add("--lr", type=cli.positive_float, default=1e-4, help="learning rate")
    add("--ema-decay", type=cli.decay, nargs="+", default=[0.9999], metavar="DECAY",
        help="decay of the weights' moving average; several: the first is sampled from, all are saved")
    add("--ema-warmup", action="store_true",
        help="warm-up of the averages: decay min(DECAY, (1 + step) / (10 + step))")
    add("--grad-accum-steps", type=cli.positive_int, default=1, help="microbatches per step")
    add("--max-grad-norm", type=cli.positive_float, help="norm to clip the gradient to")
    add("--schedule-sampler", choices=["uniform", "loss-second-moment"], default="uniform",
        help="distribution of timesteps: uniform, or importance sampling by loss")


def _add_objective_flags(add):
    add("--objective", choices=OBJECTIVES, default="ddpm",
        help="diffusion, or flow matching between noise (t = 0) and data (t = 1)")
    add("--path-type", choices=PATHS, help="path of flow matching (default there: Linear)")
    add("--prediction", choices=PREDICTIONS, help="output of the network (default with flow: velocity)")
    add("--loss-weight", choices=[name for name in LOSS_WEIGHTS if name],
        help="weight of the loss of noise or score over time; default: none")
    add("--time-sampling", choices=TIME_DISTRIBUTIONS,
        help="distribution of training times (default with flow: uniform)")
    add("--time-shift", type=cli.positive_float, metavar="S",
        help="shift of times towards the noise, in training and sampling; 1: none")
    add("--time-scale", type=cli.positive_float, metavar="FACTOR",
        help="factor of the times that the network is given; default: 1, as SiT")


def _add_speed_flags(add):
    add("--fused-adamw", action=argparse.BooleanOptionalAction, default=False, help="optimizer step in one kernel")
    add("--grad-checkpointing", type=cli.fraction, nargs="?", const=1.0, default=0.0, metavar="SHARE",
        help="share of the blocks whose activations are recomputed to save memory; alone: all")
    add("--fsdp", choices=fsdp.FSDP_MODES, nargs="?", const="all", metavar="node",
        help="shard weights, optimizer state and EMA over all ranks; node: over the ranks of a node")


def _add_output_flags(add):
    add("--results-dir", default="results", help="folder of all runs")
    add("--log-every", type=cli.non_negative_int, default=100, help="steps between log lines; 0: only the last")
    add("--ckpt-every", type=cli.non_negative_int, default=50000, help="steps between checkpoints; 0: only the last")
    add("--keep-checkpoints", type=cli.positive_int, metavar="N",
        help="number of latest checkpoints to keep (default: all)")
    add("--keep-every", type=cli.non_negative_int, metavar="STEPS",
        help="steps between checkpoints that are kept permanently; 0: off")
    add("--async-save", action="store_true", help="write checkpoints in the background")
    add("--sample-every", type=cli.non_negative_int, help="steps between grids of EMA samples; 0: off")


def _add_evaluation_flags(add):
    add("--eval-every", type=cli.non_negative_int, help="steps between evaluations of EMA samples; 0: off")
    add("--eval-reference", metavar="REF", help="reference of the evaluation, as for evaluate.py")
    add("--eval-samples", type=cli.positive_int, default=10000, help="number of samples per evaluation")
    add("--eval-features", default="inception", help="inception, pixels, or a TorchScript file")
    add("--eval-cfg-scale", type=cli.guidance_scale, default=1.0, help="guidance scale; 1: none")
    add("--eval-sampling-steps", type=cli.sampling_steps, default=250, help="as in 250, or ddim50")


def _add_fault_flags(add):
    add("--resume", metavar="PATH", help="a checkpoint, a run's folder, or auto: the latest run")
    add("--allow-config-change", action="store_true", help="resume with other values of flags")
    add("--max-bad-steps", type=cli.positive_int, default=10,
        help="number of non-finite steps in a row that end the run; none is applied")
    add("--max-loss-spike", type=cli.positive_float, metavar="FACTOR",
        help="multiple of the average loss above which a step is not applied")
    add("--dist-timeout", type=cli.minutes, default=distributed.DEFAULT_TIMEOUT, metavar="MINUTES",
        help="time that a collective waits for other ranks")


def choose_defaults(flags, explicit_args):
    """Return defaults that follow from data set and objective, for flags that are not typed."""
    objective = FLOW_DEFAULTS if flags.objective == "flow" else {}
    if flags.data_path == "fractals":
        return FRACTALS | objective
    if flags.data_path != "digits":
        return objective
    defaults = DIGITS if "model" in explicit_args else DIGITS | DIGITS_MODEL
    if "max_steps" in explicit_args:  # --epochs would end the run earlier
        defaults = {name: value for name, value in defaults.items() if name != "epochs"}
    return defaults | objective


def check_flags(flags):
    """Raise an `ArgumentError` for flags that mean nothing without another one."""
    if flags.keep_every and not flags.keep_checkpoints:
        raise ArgumentError("needs --keep-checkpoints; without it all are kept", keep_every=flags.keep_every)
    if len({f"{decay:g}" for decay in flags.ema_decay}) < len(flags.ema_decay):
        raise ArgumentError("two averages would have the same name in checkpoints. Give each decay once",
                            ema_decay=flags.ema_decay)
    if flags.eval_every and not flags.eval_reference:
        raise ArgumentError("needs --eval-reference, with which samples are compared", eval_every=flags.eval_every)
    if flags.eval_reference and not flags.eval_every:
        raise ArgumentError("needs --eval-every, the steps between evaluations", eval_reference=flags.eval_reference)
    if flags.cache_on_device and not flags.features_path:
        raise ArgumentError("needs --features-path: only a latent cache is kept on the device", cache_on_device=None)
    if flags.cuda_graphs and (flags.fsdp or flags.grad_accum_steps > 1):
        raise ArgumentError("a graph needs fixed addresses of weights and gradients; --fsdp and --grad-accum-steps "
                            "move them", cuda_graphs=None)
