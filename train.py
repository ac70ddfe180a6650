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
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from evaluation.during_training import open_evaluator
from evaluation.sources import GeneratedImages
from runtime import data, experiment, latent_cache, latents, processes, sharding
from runtime.ema import EMA
from runtime.errors import Stopped, UserError, run_command
from runtime.flags import (
    HelpFormatter,
    add_speed_flags,
    decay,
    fraction,
    guidance_scale,
    minutes,
    non_negative_int,
    parse,
    positive_float,
    positive_int,
    sampling_steps,
    speed_of,
)
from runtime.generate import image_maker, preview
from runtime.provenance import made_with
from runtime.randomness import WEIGHTS, BatchRandomness, seed_of
from runtime.saving import Saver
from runtime.signals import StopSignals
from runtime.step_guard import StepGuard
from runtime.training_state import TrainingState
from runtime.training_step import TrainingStep, gradient_norm
from runtime.update import Update

# What --data-path digits means for the flags that are not typed: its format, and a small model with what suits it.
DIGITS = data.EMBEDDED["digits"] | dict(vae="none", num_workers=0)
DIGITS_MODEL = dict(model="DiT-S/2", depth=4, hidden_size=96, num_heads=4, global_batch_size=64, lr=4e-3,
                    ema_decay=0.997, epochs=136, ckpt_every=1000)
# The fractals take the paper's models and recipe: pixels of 32 x 32 make the tokens of latents of 32 x 32.
FRACTALS = data.EMBEDDED["fractals"] | dict(vae="none")


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
    group = add_speed_flags(parser)
    group.add_argument("--fused-adamw", action=argparse.BooleanOptionalAction, default=False,
                       help="the optimiser's step in one kernel")
    group.add_argument("--grad-checkpointing", type=fraction, nargs="?", const=1.0, default=0.0, metavar="SHARE",
                       help="compute activations of this share of the blocks twice, to save memory; alone: all")
    group.add_argument("--fsdp", choices=sharding.WHERE, nargs="?", const="all", metavar="node",
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
    group.add_argument("--timeout", type=minutes, default=processes.PATIENCE, metavar="MINUTES",
                       help="how long a process waits for the others")
    return parser


def main():
    flags, given = parse(build_parser())
    if flags.data_path in data.EMBEDDED:
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
        with processes.waiting("the start", flags.timeout):
            accelerator = processes.start(flags.precision != "fp32", flags.timeout)
            run = prepare(accelerator, flags, given)
        train(run, flags, signals)
    accelerator.end_training()


@dataclass
class Run:
    """What a training run consists of. `prepare` makes it, `train` uses it up."""

    accelerator: object
    dataset: object
    codec: object
    model: torch.nn.Module
    network: torch.nn.Module  # the model itself, or behind DDP where several processes do not share it
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    state: TrainingState
    saver: Saver
    batches: data.GlobalBatches
    step: object
    evaluator: object  # an `Evaluator`, or None
    folder: str
    logger: object


def prepare(accelerator, flags, given):
    """Everything that can go wrong before the first step: a `Run`, or a `UserError` on all processes."""
    device, log = accelerator.device, []
    with processes.together(accelerator):
        speed = speed_of(flags, given, device, log.append)
        rows = data.own_rows(accelerator, flags.global_batch_size, flags.grad_accum_steps)
        dataset, codec = open_dataset(flags, given, device)
        model = build_model(flags, codec)
    if flags.cuda_graphs and (flags.fsdp or flags.grad_accum_steps > 1):
        raise UserError("--cuda-graphs: a graph needs its weights and gradients where they were; --fsdp and "
                        "--grad-accum-steps move them")
    mesh = sharding.open_mesh(accelerator, flags.fsdp, flags.timeout) if flags.fsdp else None
    network, ema = distributed(accelerator, model, flags.ema_decay, mesh, speed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0, fused=flags.fused_adamw or None)
    diffusion = create_diffusion(timestep_respacing="")
    schedule_sampler = create_named_schedule_sampler(flags.schedule_sampler, diffusion)
    guard = StepGuard(accelerator, flags.max_bad_steps, flags.max_loss_spike)
    state = TrainingState(model, optimizer, schedule_sampler, guard, ema, vars(flags), dict(
        image_channels=dataset.channels, class_names=dataset.class_names, num_images=len(dataset),
        latents=codec.record()))

    evaluator = None
    if flags.eval_every:
        evaluator = open_evaluation(accelerator, flags, ema.sampled, codec, dataset, rows, speed)
    folder, resumed, warnings = processes.on_main(accelerator, lambda: experiment.open_folder(
        flags.results_dir, flags.model, flags.resume))
    model.checkpointed = flags.grad_checkpointing
    speed.set_up(model, by_block=accelerator.num_processes > 1)  # after the EMA was copied of it
    with processes.together(accelerator):
        first_step, changes = state.restore(resumed, flags.override) if resumed else (0, [])
    warnings += [f"WARNING: {change} (--override)" for change in changes]
    steps_per_epoch = len(dataset) // flags.global_batch_size
    last_step = min(flags.epochs * steps_per_epoch, flags.max_steps or math.inf)
    with processes.together(accelerator):
        saver = Saver(accelerator, state, folder, flags.keep_checkpoints, flags.keep_every, resumed, flags.async_save)
        logger = guard.logger = experiment.open_log(folder, accelerator.is_main_process)
        if accelerator.is_main_process:
            for line in (*opening_lines(flags, folder, accelerator, model, dataset, resumed, first_step, last_step),
                         *log, *warnings, *latents.first_look(codec, dataset.examples(latents.LOOKED_AT), device)):
                logger.info(line)
    batches = data.GlobalBatches(len(dataset), flags.global_batch_size, rows, flags.global_seed, first_step, last_step,
                                 flips=flags.flip)
    random = BatchRandomness(flags.global_seed, flags.global_batch_size, rows, device)
    step = TrainingStep(accelerator, network, codec, diffusion, schedule_sampler, random, parts=flags.grad_accum_steps,
                        speed=speed)
    if evaluator:
        evaluator.begin(folder, first_step, logger.info)
    return Run(accelerator, dataset, codec, model, network, optimizer, guard, state, saver, batches, step, evaluator,
               folder, logger)


def train(run, flags, signals):
    """The training loop. Ends by `Stopped` where one of `signals` asked for it, on any process."""
    accelerator, batches, logger = run.accelerator, run.batches, run.logger
    warn = logger.info if accelerator.is_main_process else functools.partial(print, file=sys.stderr, flush=True)
    bad_images = data.BadImages(flags.max_bad_images, os.path.join(run.folder, "bad_images.txt"), warn)
    watch = processes.Watch(accelerator)
    update = Update(run.model, run.optimizer, run.state.ema, run.guard, run.step)
    run.network.train()
    with (processes.waiting("training", flags.timeout),
          experiment.Monitor(accelerator, logger, run.folder, batches.first, batches.last,
                             flags.global_batch_size) as monitor):
        with processes.together(accelerator):
            loader = data.BatchLoader(run.dataset, batches, flags.num_workers, accelerator.device, bad_images.add)
        if run.evaluator and batches.first and batches.first % flags.eval_every == 0 and run.evaluator.lacks(
                batches.first):  # the run ended between saving this step and measuring it
            evaluate(run, batches.first, monitor, signals, is_saved=True)
        for step, (images, labels) in enumerate(loader, start=batches.first):
            if step % batches.steps_per_epoch == 0 and batches.steps_per_epoch >= flags.log_every:
                logger.info(f"Beginning epoch {step // batches.steps_per_epoch}...")
            with processes.waiting(f"the gradients of step {step + 1}", flags.timeout):
                losses = run.step.backward(step, images, labels)
            grad_norm = gradient_norm(run.model, flags.max_grad_norm)
            update(step, losses, grad_norm, batches.items, monitor)

            done = step + 1
            with processes.waiting(f"the agreement on step {done}", flags.timeout):
                stop, fault, write_failed = watch.exchange(signals.received, loader.fault, run.saver.has_failed())
                last = done == batches.last or stop or fault or run.guard.exhausted
                if done % flags.log_every == 0 or last:
                    run.guard.settle()
                    monitor.show(done, grad_norm=grad_norm, learning_rate=flags.lr)
            if is_saved := done % flags.ckpt_every == 0 or last or write_failed:
                path = run.saver.save(done)
                logger.info(f"{'Saving' if flags.async_save else 'Saved'} checkpoint to {path}")
            if flags.sample_every and done % flags.sample_every == 0:
                with monitor.paused(), processes.together(accelerator), run.state.ema.whole() as ema:
                    if accelerator.is_main_process:
                        monitor.show_images(done, *preview(ema, run.codec, run.dataset.class_names))
            if run.evaluator and done % flags.eval_every == 0 and not (stop or fault or run.guard.exhausted):
                evaluate(run, done, monitor, signals, is_saved)
            if last:
                run.saver.finish()
                run.guard.check(path)
                with processes.together(accelerator):
                    loader.check()
                if stop and done < batches.last:
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


def open_evaluation(accelerator, flags, model, codec, dataset, rows, speed):
    """What measures samples of `model`, the EMA, as the --eval flags say. To be called by all processes."""
    try:
        with processes.together(accelerator):
            make = image_maker(model, codec, flags.eval_sampling_steps, flags.eval_cfg_scale, speed=speed)
        made_of = dict(model=flags.model, weights="ema", ema_decay=flags.ema_decay, image_size=flags.image_size,
                       vae=flags.vae) | made_with(accelerator.device)
        images = GeneratedImages(make, len(dataset.class_names), flags.eval_samples, flags.global_seed, made_of=made_of)
        batch_size = (rows.stop - rows.start) // flags.grad_accum_steps
        return open_evaluator(accelerator, flags.eval_features, flags.eval_reference, images, batch_size,
                              flags.image_size)
    except UserError as error:  # the parts name the flags of sample.py and evaluate.py
        names = r"--(?:num-)?(features|reference|cfg-scale|sampling-steps)\b"
        raise UserError(re.sub(names, r"--eval-\1", str(error)), shown=error.shown) from None


def open_dataset(flags, given, device):
    """The images of --data-path, or the latents of --features-path, and their codec.

    Flags that were not typed follow from the data. raise: `UserError` where those that were do not fit it.
    """
    if flags.features_path:
        cache = latent_cache.LatentCache(flags.features_path)
        codec = cache.codec(*(getattr(flags, name) if name in given else None for name in ("vae", "image_size")),
                            device=device, decodes=bool(flags.sample_every or flags.eval_every))
        flags.vae, flags.image_size = codec.name, cache.image_size
        dataset = cache.in_memory(device) if flags.features_in_memory else cache
    elif flags.features_in_memory:
        raise UserError("--features-in-memory needs --features-path: only a latent cache is kept on the device")
    else:
        dataset = data.open_data(flags.data_path, flags.image_size, flags.max_bad_images, flags.num_classes)
        codec = latents.open_codec(flags.vae, dataset.channels, device)
    source = flags.features_path or flags.data_path
    if flags.flip and flags.features_path and not dataset.flips:
        raise UserError(f"--flip: the cache {source} was made without mirror images (--no-flip)")
    flags.flip = dataset.flips if flags.flip is None else flags.flip
    if len(dataset.class_names) > flags.num_classes:
        raise UserError(f"--num-classes {flags.num_classes}: {source} has {len(dataset.class_names)} classes")
    if len(dataset) < flags.global_batch_size:
        raise UserError(f"--global-batch-size {flags.global_batch_size}: {source} has {len(dataset)} images, "
                        "not enough for one batch")
    return dataset, codec


def build_model(flags, codec):
    """The DiT of --model, with whatever sizes were given beside it; the same initial weights on every process."""
    sizes = {name: getattr(flags, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    torch.manual_seed(seed_of(flags.global_seed, WEIGHTS))
    try:
        return models.DiT_models[flags.model](
            input_size=latents.latent_size(codec, flags.image_size), in_channels=codec.channels,
            num_classes=flags.num_classes, class_dropout_prob=flags.class_dropout_prob, conditioning=flags.conditioning,
            **{name: value for name, value in sizes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--model {flags.model} at --image-size {flags.image_size}: {error}") from None


def distributed(accelerator, model, ema_decay, mesh, speed):
    """What computes the gradients over all processes, and the `EMA`; sharded over `mesh`, if any."""
    if mesh is None:
        network = accelerator.prepare(model.to(accelerator.device))
        return network, EMA(model, ema_decay)
    ema = EMA(model, ema_decay)  # before the model is sharded, which cannot be copied then
    ema.shard(mesh)
    return sharding.shard(model, mesh, speed.precision), ema


def opening_lines(flags, folder, accelerator, model, dataset, resumed, first_step, last_step):
    """What log.txt begins with."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield f"Experiment directory created at {folder}" if not resumed else f"Experiment directory: {folder}"
    yield f"{accelerator.num_processes} process(es) on {accelerator.device.type}, " + ", ".join(
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
        others = [os.path.basename(path) for path in experiment.experiment_folders(flags.results_dir) if path != folder]
        yield (f"WARNING: --resume auto: no checkpoint of {flags.model} in {flags.results_dir}, starting from the "
               "beginning" + (f" (of others: {', '.join(others[-3:])})" if others else ""))
    limit = "--max-steps" if last_step == flags.max_steps else f"--epochs {flags.epochs}"
    yield f"Training for {last_step - first_step} steps, to step {last_step} ({limit})" if first_step < last_step else (
        f"Nothing to do: {first_step} steps are done, --epochs and --max-steps ask for {last_step}")


if __name__ == "__main__":
    run_command(main)
