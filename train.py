"""Train a DiT.

    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --features-path /path/to/latents
    python train.py --data-path digits                   # no GPU, no download: minutes on a laptop
    python train.py --data-path fractals --model DiT-S/4 # no download: 100 classes of 1,000 colour images of 32 x 32

Without flags this is the paper's recipe: AdamW, learning rate 1e-4, batch 256, EMA 0.9999, horizontal flips.
"""
import argparse
import functools
import math
import os
import re
import sys
from dataclasses import dataclass

import torch

import models
from autoencoder.checks import NUM_CHECK_IMAGES, check_autoencoder
from autoencoder.vae import latent_size, load_autoencoder
from common import distributed
from common.cli import (
    HelpFormatter,
    add_compute_flags,
    build_compute_config,
    decay,
    fraction,
    guidance_scale,
    minutes,
    non_negative_int,
    parse_args,
    positive_float,
    positive_int,
    sampling_steps,
)
from common.errors import Stopped, UserError, run_command
from common.provenance import collect_environment
from common.seeding import WEIGHTS, BatchRNG, derive_seed
from common.signals import StopSignals
from data import build_dataset
from data.builtin import BUILTIN_DATASETS
from data.corrupt_images import CorruptImageLog
from data.latent_cache.reader import LatentCache
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler, local_batch_slice
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from evaluation.image_sources import GeneratedImages
from evaluation.periodic import build_evaluator
from sampling.pipeline import build_pipeline, sample_preview
from training.checkpoint_manager import CheckpointManager, open_run_dir
from training.ema import EMA
from training.fsdp import FSDP_MODES, init_mesh, shard_model
from training.logger import MetricLogger, open_log
from training.nan_guard import NonFiniteGuard
from training.run_dir import list_run_dirs
from training.train_state import TrainState
from training.train_step import TrainingStep, Update, clip_grad_norm

# What --data-path digits means for the flags that are not typed: its format, and a small model with what suits it.
DIGITS = BUILTIN_DATASETS["digits"] | dict(vae="none", num_workers=0)
DIGITS_MODEL = dict(model="DiT-S/2", depth=4, hidden_size=96, num_heads=4, global_batch_size=64, lr=4e-3,
                    ema_decay=0.997, epochs=136, ckpt_every=1000)
# The fractals take the paper's models and recipe: pixels of 32 x 32 make the tokens of latents of 32 x 32.
FRACTALS = BUILTIN_DATASETS["fractals"] | dict(vae="none")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="folder with a folder of images a class, or: digits, fractals")
    source.add_argument("--features-path", help="instead: a latent cache of extract_features.py")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="rows of the class table")
    group.add_argument("--vae", default="ema", help="ema, mse, a diffusers directory or hub name, or none (pixels)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="mirror half of the images (not digits and fractals)")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes that load images")
    group.add_argument("--features-in-memory", action="store_true", help="keep the whole cache on the device")
    group.add_argument("--max-bad-images", type=non_negative_int, default=0,
                       help="so many files may be unreadable; each is replaced by the next one of the data set")
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=models.DiT_models, default="DiT-XL/2", help="its sizes, unless given:")
    group.add_argument("--depth", type=positive_int, help="number of blocks")
    group.add_argument("--hidden-size", type=positive_int, help="width")
    group.add_argument("--num-heads", type=positive_int, help="attention heads")
    group.add_argument("--patch-size", type=positive_int, help="latents a side of a token")
    group.add_argument("--conditioning", choices=models.CONDITIONINGS, default="adaln-zero",
                       help="block type: how the timestep and the class come in")
    group.add_argument("--class-dropout-prob", type=fraction, default=0.1, help="0: no null class, no guidance")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, help="stop after so many steps, or after --epochs")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step, over all processes")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="of all random numbers")
    group.add_argument("--lr", type=positive_float, default=1e-4, help="learning rate")
    group.add_argument("--ema-decay", type=decay, default=0.9999, help="of the weights' average")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, help="cut the batch in so many parts")
    group.add_argument("--max-grad-norm", type=positive_float, help="clip the gradient to this norm")
    group.add_argument("--schedule-sampler", choices=["uniform", "loss-second-moment"], default="uniform",
                       help="which timesteps: all alike, or more of those with a large loss")
    group = add_compute_flags(parser)
    group.add_argument("--fused-adamw", action=argparse.BooleanOptionalAction, default=False,
                       help="the optimiser's step in one kernel")
    group.add_argument("--grad-checkpointing", type=fraction, nargs="?", const=1.0, default=0.0, metavar="SHARE",
                       help="compute activations of this share of the blocks twice, to save memory; alone: all")
    group.add_argument("--fsdp", choices=FSDP_MODES, nargs="?", const="all", metavar="node",
                       help="share weights, moments and EMA between all processes; node: between those of a node, all "
                            "nodes the same")
    group = parser.add_argument_group("results")
    group.add_argument("--results-dir", default="results", help="where experiments get their folders")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    group.add_argument("--ckpt-every", type=positive_int, default=50000, help="steps")
    group.add_argument("--keep-checkpoints", type=positive_int, metavar="N", help="keep the newest N (default: all)")
    group.add_argument("--keep-every", type=positive_int, metavar="STEPS", help="and those of every so many steps")
    group.add_argument("--async-save", action="store_true", help="write checkpoints while training goes on")
    group.add_argument("--sample-every", type=positive_int, help="steps between grids of EMA samples")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-every", type=positive_int, help="steps between measurements of EMA samples")
    group.add_argument("--eval-reference", metavar="REF", help="what they are compared with, as of evaluate.py")
    group.add_argument("--eval-samples", type=positive_int, default=10000, help="how many are made each time")
    group.add_argument("--eval-features", default="inception", help="inception, pixels, or a TorchScript file")
    group.add_argument("--eval-cfg-scale", type=guidance_scale, default=1.0, help="their guidance; 1: none")
    group.add_argument("--eval-sampling-steps", type=sampling_steps, default=250, help="as in 250, or ddim50")
    group = parser.add_argument_group("faults")
    group.add_argument("--resume", metavar="PATH", help="a checkpoint, an experiment's folder, or: auto (the latest)")
    group.add_argument("--override", action="store_true", help="resume although flags have other values than then")
    group.add_argument("--max-bad-steps", type=positive_int, default=10,
                       help="end after so many steps in a row whose loss or gradient is not finite; none is applied")
    group.add_argument("--max-loss-spike", type=positive_float, metavar="FACTOR",
                       help="nor is a step with a loss of more than so many times its average")
    group.add_argument("--timeout", type=minutes, default=distributed.DEFAULT_TIMEOUT, metavar="MINUTES",
                       help="how long a process waits for the others")
    return parser


def main():
    flags, given = parse_args(build_parser())
    if flags.data_path in BUILTIN_DATASETS:
        defaults = FRACTALS if flags.data_path == "fractals" else DIGITS if "model" in given else DIGITS | DIGITS_MODEL
        typed = given | {"epochs"} if "max_steps" in given else given
        vars(flags).update({name: value for name, value in defaults.items() if name not in typed})
    if flags.keep_every and not flags.keep_checkpoints:
        raise UserError(f"--keep-every {flags.keep_every} needs --keep-checkpoints; without it all are kept")
    if flags.eval_every and not flags.eval_reference:
        raise UserError(f"--eval-every {flags.eval_every} needs --eval-reference: what the samples are compared with")
    if flags.eval_reference and not flags.eval_every:
        raise UserError(f"--eval-reference {flags.eval_reference} needs --eval-every: after how many steps, each time")
    if os.path.isdir(flags.vae):
        flags.vae = os.path.abspath(flags.vae)  # checkpoints keep it, and are sampled from elsewhere
    with StopSignals() as signals:
        with distributed.collective_timeout("the start", flags.timeout):
            distributed.init(flags.precision != "fp32", flags.timeout)
            run = prepare(flags, given)
        train(run, flags, signals)
    distributed.shutdown()


@dataclass
class Run:
    """What a training run consists of. `prepare` makes it, `train` uses it up."""

    dataset: object
    autoencoder: object
    model: torch.nn.Module
    network: torch.nn.Module  # the model itself, or behind DDP where several processes do not share it
    optimizer: torch.optim.Optimizer
    guard: NonFiniteGuard
    state: TrainState
    saver: CheckpointManager
    batches: StepBatchSampler
    step: object
    evaluator: object  # an `PeriodicEvaluator`, or None
    folder: str
    logger: object


def prepare(flags, given):
    """Everything that can go wrong before the first step: a `Run`, or a `UserError` on all processes."""
    device, log = distributed.device(), []
    with distributed.raise_on_all_ranks():
        compute = build_compute_config(flags, device, log.append)
        rows = local_batch_slice(flags.global_batch_size, flags.grad_accum_steps)
        dataset, autoencoder = open_dataset(flags, given, device)
        model = build_model(flags, autoencoder)
    if flags.cuda_graphs and (flags.fsdp or flags.grad_accum_steps > 1):
        raise UserError("--cuda-graphs: a graph needs its weights and gradients where they were; --fsdp and "
                        "--grad-accum-steps move them")
    mesh = init_mesh(flags.fsdp, flags.timeout) if flags.fsdp else None
    network, ema = distribute(model, flags.ema_decay, mesh, compute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0, fused=flags.fused_adamw or None)
    diffusion = create_diffusion(timestep_respacing="")
    schedule_sampler = create_named_schedule_sampler(flags.schedule_sampler, diffusion)
    guard = NonFiniteGuard(flags.max_bad_steps, flags.max_loss_spike)
    state = TrainState(model, optimizer, schedule_sampler, guard, ema, vars(flags), dict(
        image_channels=dataset.channels, class_names=dataset.class_names, num_images=len(dataset),
        latents=autoencoder.metadata()))

    evaluator = None
    if flags.eval_every:
        evaluator = open_evaluation(flags, ema.sampled, autoencoder, dataset, rows, compute)
    folder, resumed, warnings = distributed.run_on_rank0_and_broadcast(lambda: open_run_dir(
        flags.results_dir, flags.model, flags.resume))
    model.checkpointed = flags.grad_checkpointing
    compute.prepare(model, by_block=distributed.world_size() > 1)  # after the EMA was copied of it
    with distributed.raise_on_all_ranks():
        first_step, changes = state.restore(resumed, flags.override) if resumed else (0, [])
    warnings += [f"WARNING: {change} (--override)" for change in changes]
    steps_per_epoch = len(dataset) // flags.global_batch_size
    last_step = min(flags.epochs * steps_per_epoch, flags.max_steps or math.inf)
    with distributed.raise_on_all_ranks():
        saver = CheckpointManager(state, folder, flags.keep_checkpoints, flags.keep_every, resumed, flags.async_save)
        logger = guard.logger = open_log(folder, distributed.is_rank0())
        if distributed.is_rank0():
            for line in (*opening_lines(flags, folder, model, dataset, resumed, first_step, last_step),
                         *log, *warnings, *check_autoencoder(autoencoder, dataset.examples(NUM_CHECK_IMAGES), device)):
                logger.info(line)
    batches = StepBatchSampler(len(dataset), flags.global_batch_size, rows, flags.global_seed, first_step, last_step,
                                 flips=flags.flip)
    random = BatchRNG(flags.global_seed, flags.global_batch_size, rows, device)
    step = TrainingStep(network, autoencoder, diffusion, schedule_sampler, random, parts=flags.grad_accum_steps,
                        compute=compute)
    if evaluator:
        evaluator.begin(folder, first_step, logger.info)
    return Run(dataset, autoencoder, model, network, optimizer, guard, state, saver, batches, step, evaluator,
               folder, logger)


def train(run, flags, signals):
    """The training loop. Ends by `Stopped` where one of `signals` asked for it, on any process."""
    batches, logger = run.batches, run.logger
    warn = logger.info if distributed.is_rank0() else functools.partial(print, file=sys.stderr, flush=True)
    bad_images = CorruptImageLog(flags.max_bad_images, os.path.join(run.folder, "bad_images.txt"), warn)
    watch = distributed.AsyncFlagReducer()
    update = Update(run.model, run.optimizer, run.state.ema, run.guard, run.step)
    run.network.train()
    with (distributed.collective_timeout("training", flags.timeout),
          MetricLogger(logger, run.folder, batches.start_step, batches.end_step,
                             flags.global_batch_size) as monitor):
        with distributed.raise_on_all_ranks():
            loader = PrefetchLoader(run.dataset, batches, flags.num_workers, distributed.device(), bad_images.add)
        if run.evaluator and batches.start_step and batches.start_step % flags.eval_every == 0 and run.evaluator.lacks(
                batches.start_step):  # the run ended between saving this step and measuring it
            evaluate(run, batches.start_step, monitor, signals, is_saved=True)
        for step, (images, cond) in enumerate(loader, start=batches.start_step):
            if step % batches.steps_per_epoch == 0 and batches.steps_per_epoch >= flags.log_every:
                logger.info(f"Beginning epoch {step // batches.steps_per_epoch}...")
            with distributed.collective_timeout(f"the gradients of step {step + 1}", flags.timeout):
                losses = run.step.backward(step, images, cond["y"])
            grad_norm = clip_grad_norm(run.model, flags.max_grad_norm)
            update(step, losses, grad_norm, batches.items, monitor)

            done = step + 1
            with distributed.collective_timeout(f"the agreement on step {done}", flags.timeout):
                stop, fault, write_failed = watch.exchange(signals.received, loader.fault, run.saver.has_failed())
                last = done == batches.end_step or stop or fault or run.guard.exhausted
                if done % flags.log_every == 0 or last:
                    run.guard.settle()
                    monitor.show(done, grad_norm=grad_norm, learning_rate=flags.lr)
            if is_saved := done % flags.ckpt_every == 0 or last or write_failed:
                path = run.saver.save(done)
                logger.info(f"{'Saving' if flags.async_save else 'Saved'} checkpoint to {path}")
            if flags.sample_every and done % flags.sample_every == 0:
                with monitor.paused(), distributed.raise_on_all_ranks(), run.state.ema.whole() as ema:
                    if distributed.is_rank0():
                        monitor.show_images(done, *sample_preview(ema, run.autoencoder, run.dataset.class_names))
            if run.evaluator and done % flags.eval_every == 0 and not (stop or fault or run.guard.exhausted):
                evaluate(run, done, monitor, signals, is_saved)
            if last:
                run.saver.finish()
                run.guard.check(path)
                with distributed.raise_on_all_ranks():
                    loader.check()
                if stop and done < batches.end_step:
                    logger.info(f"Stopped by {signals.received or 'another process'} after {done} steps; --resume auto "
                                "goes on")
                    raise Stopped
        logger.info("Done!")


def evaluate(run, step, monitor, signals, is_saved):
    """Measure EMA samples, show the scores, and keep the checkpoint of the best ones. It never ends the run."""
    try:
        with monitor.paused(), run.state.ema.whole():
            found = run.evaluator(step, lambda: run.saver.keep_best(step, is_saved), lambda: signals.received)
    except Exception as error:  # the same on all processes, since they agree on errors
        run.logger.info(f"WARNING: (step={step:07d}) the evaluation failed; training goes on: "
                        f"{error or type(error).__name__}")
    else:
        if found is None:
            run.logger.info(f"(step={step:07d}) the evaluation was given up: told to stop")
        else:
            monitor.show_scores(step, found)


def open_evaluation(flags, model, autoencoder, dataset, rows, compute):
    """What measures samples of `model`, the EMA, as the --eval flags say. To be called by all processes."""
    try:
        with distributed.raise_on_all_ranks():
            make = build_pipeline(model, autoencoder, flags.eval_sampling_steps, flags.eval_cfg_scale, compute=compute)
        made_of = dict(model=flags.model, weights="ema", ema_decay=flags.ema_decay, image_size=flags.image_size,
                       vae=flags.vae) | collect_environment(distributed.device())
        images = GeneratedImages(make, len(dataset.class_names), flags.eval_samples, flags.global_seed, model_metadata=made_of)
        batch_size = (rows.stop - rows.start) // flags.grad_accum_steps
        return build_evaluator(flags.eval_features, flags.eval_reference, images, batch_size,
                              flags.image_size)
    except UserError as error:  # the parts name the flags of sample.py and evaluate.py
        names = r"--(?:num-)?(features|reference|cfg-scale|sampling-steps)\b"
        raise UserError(re.sub(names, r"--eval-\1", str(error)), shown=error.shown) from None


def open_dataset(flags, given, device):
    """The images of --data-path, or the latents of --features-path, and their codec.

    Flags that were not typed follow from the data. raise: `UserError` where those that were do not fit it.
    """
    if flags.features_path:
        cache = LatentCache(flags.features_path)
        autoencoder = cache.autoencoder(*(getattr(flags, name) if name in given else None for name in ("vae", "image_size")),
                            device=device, decodes=bool(flags.sample_every or flags.eval_every))
        flags.vae, flags.image_size = autoencoder.name, cache.image_size
        dataset = cache.in_memory(device) if flags.features_in_memory else cache
    elif flags.features_in_memory:
        raise UserError("--features-in-memory needs --features-path: only a latent cache is kept on the device")
    else:
        dataset = build_dataset(flags.data_path, flags.image_size, flags.max_bad_images, flags.num_classes)
        autoencoder = load_autoencoder(flags.vae, dataset.channels, device)
    source = flags.features_path or flags.data_path
    if flags.flip and flags.features_path and not dataset.flips:
        raise UserError(f"--flip: the cache {source} was made without mirror images (--no-flip)")
    flags.flip = dataset.flips if flags.flip is None else flags.flip
    if len(dataset.class_names) > flags.num_classes:
        raise UserError(f"--num-classes {flags.num_classes}: {source} has {len(dataset.class_names)} classes")
    if len(dataset) < flags.global_batch_size:
        raise UserError(f"--global-batch-size {flags.global_batch_size}: {source} has {len(dataset)} images, "
                        "not enough for one batch")
    return dataset, autoencoder


def build_model(flags, autoencoder):
    """The DiT of --model, with whatever sizes were given beside it; the same initial weights on every process."""
    sizes = {name: getattr(flags, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    torch.manual_seed(derive_seed(flags.global_seed, WEIGHTS))
    try:
        return models.DiT_models[flags.model](
            input_size=latent_size(autoencoder, flags.image_size), in_channels=autoencoder.channels,
            num_classes=flags.num_classes, class_dropout_prob=flags.class_dropout_prob, conditioning=flags.conditioning,
            **{name: value for name, value in sizes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--model {flags.model} at --image-size {flags.image_size}: {error}") from None


def distribute(model, ema_decay, mesh, compute):
    """What computes the gradients over all processes, and the `EMA`; sharded over `mesh`, if any."""
    if mesh is None:
        network = distributed.data_parallel(model)
        return network, EMA(model, ema_decay)
    ema = EMA(model, ema_decay)  # before the model is sharded, which cannot be copied then
    ema.shard(mesh)
    return shard_model(model, mesh, compute.precision), ema


def opening_lines(flags, folder, model, dataset, resumed, first_step, last_step):
    """What log.txt begins with."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield f"Experiment directory created at {folder}" if not resumed else f"Experiment directory: {folder}"
    yield f"{distributed.world_size()} process(es) on {distributed.device().type}, " + ", ".join(
        f"{name}={value}" for name, value in vars(flags).items())
    yield f"DiT Parameters: {parameters:,}"
    yield (f"Dataset contains {len(dataset):,} images in {len(dataset.class_names)} classes "
           f"({flags.features_path or flags.data_path})")
    if len(dataset.class_names) < flags.num_classes:
        yield (f"WARNING: --num-classes is {flags.num_classes}: the classes {len(dataset.class_names)} .. "
               f"{flags.num_classes - 1} have no image and will not be learned")
    if resumed:
        yield f"Resuming from {resumed} at step {first_step}"
    elif flags.resume:
        others = [os.path.basename(path) for path in list_run_dirs(flags.results_dir) if path != folder]
        yield (f"WARNING: --resume auto: no checkpoint of {flags.model} in {flags.results_dir}, starting from the "
               "beginning" + (f" (of others: {', '.join(others[-3:])})" if others else ""))
    limit = "--max-steps" if last_step == flags.max_steps else f"--epochs {flags.epochs}"
    yield f"Training for {last_step - first_step} steps, to step {last_step} ({limit})" if first_step < last_step else (
        f"Nothing to do: {first_step} steps are done, --epochs and --max-steps ask for {last_step}")


if __name__ == "__main__":
    run_command(main)
