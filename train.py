"""Train a DiT.

    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --features-path /path/to/latents
    python train.py --data-path digits                   # no GPU, no download: minutes on a laptop
    python train.py --data-path fractals --model DiT-S/4 # no download: 100 classes of 1,000 color images of 32 x 32

Without flags this is the paper's recipe: AdamW, learning rate 1e-4, batch 256, EMA 0.9999, horizontal flips.
The algorithm is training/train_step.py.
"""
import common.startup  # noqa: F401

import functools
import math
import os
import sys

import torch

import networks
from autoencoder.checks import NUM_CHECK_IMAGES, check_autoencoder
from autoencoder.vae import latent_size, load_autoencoder, load_cached_latents
from common import distributed
from common.cli import build_compute_config, parse_args
from common.errors import ArgumentError, UserError, rename_arguments, run_command
from common.files import check_writable
from common.provenance import collect_environment
from common.resources import check_num_workers
from common.seeding import WEIGHTS, BatchRNG, derive_seed
from common.signals import StopSignals
from data import build_dataset
from data.corrupt_images import CorruptImageLog
from data.latent_cache.reader import LatentCache
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler, local_batch_slice
from evaluation.image_sources import GeneratedImages
from evaluation.periodic import build_evaluator
from models import DiT_models
from sampling.pipeline import build_pipeline, sample_preview
from training import fsdp
from training.checkpoint_manager import CheckpointManager
from training.cli import build_parser, check_flags, choose_defaults
from training.ema import EMA
from training.fault_tolerance import FaultTolerance
from training.logger import MetricLogger, open_log
from training.memory import check_run_memory
from training.nan_guard import NonFiniteGuard
from training.objective import build_objective, check_objective_flags
from training.run_dir import open_run_dir, remove_unused_run_dir
from training.summary import opening_lines, plan_line
from training.train_state import EMAStates, ModelState, OptimizerState, find_config_changes, match_averages
from training.train_step import TrainStep

# Parameters of the evaluation, and the flags that set them here.
EVALUATION_FLAGS = dict(features="eval_features", reference="eval_reference", cfg_scale="eval_cfg_scale",
                        num_sampling_steps="eval_sampling_steps", num_fid_samples="eval_samples",
                        batch_size="global_batch_size")


def main():
    """Train as the command line says."""
    flags, explicit_args = parse_args(build_parser(description=__doc__), choose_defaults)
    check_flags(flags)
    check_objective_flags(flags, explicit_args)
    with StopSignals() as signals:
        with distributed.collective_timeout("the start", flags.dist_timeout):
            device = distributed.init(flags.precision != "fp32", flags.dist_timeout)
            run = prepare(flags, explicit_args, device)
        train(flags, signals, *run)
    distributed.shutdown()


def prepare(flags, explicit_args, device):
    """Build everything before the first step: the other arguments of `train`. Errors are raised on all ranks."""
    log_lines = []
    with distributed.raise_on_all_ranks():
        if not flags.resume and distributed.is_rank0():  # the only rank that writes results
            check_writable(flags.results_dir, is_folder=True, results_dir=flags.results_dir)
        check_num_workers(flags.num_workers)
        check_run_memory(flags, device)
        compute = build_compute_config(flags, device, log_lines.append)
        rows = local_batch_slice(flags.global_batch_size, flags.grad_accum_steps)
    with distributed.raise_on_all_ranks():  # a block of its own, since `open_dataset` is a collective
        dataset = open_dataset(flags)
    with distributed.raise_on_all_ranks():
        dataset, autoencoder, flip = open_autoencoder(flags, explicit_args, dataset, device)
        model = build_model(flags, dataset, autoencoder)
    network, emas = distribute(model, flags, compute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0, fused=flags.fused_adamw or None)
    objective, schedule_sampler = build_objective(flags)
    evaluator = build_evaluation(flags, emas[0], autoencoder, dataset, rows, compute) if flags.eval_every else None

    run_dir, resumed, warnings = distributed.run_on_rank0_and_broadcast(
        lambda: open_run_dir(flags.results_dir, flags.model, flags.resume))
    model.checkpointed = flags.grad_checkpointing
    compute.prepare(model)  # after the EMA was copied from it
    guard = NonFiniteGuard(flags.max_bad_steps, flags.max_loss_spike)
    args = vars(flags) | dict(vae=autoencoder.name, image_size=dataset.image_size, flip=flip,
                              ema_decay=flags.ema_decay if len(emas) > 1 else flags.ema_decay[0])
    config = dict(image_channels=dataset.channels, class_names=dataset.class_names, num_images=len(dataset),
                  latents=autoencoder.metadata(), model=networks.model_config(model))
    extra_emas = dict(extra_emas=EMAStates(emas[1:])) if len(emas) > 1 else {}
    with distributed.raise_on_all_ranks():
        checkpoints = CheckpointManager(
            run_dir, dict(args=args, config=config), flags.keep_checkpoints, flags.keep_every, resumed,
            flags.async_save, model=ModelState(model),
            ema=ModelState(emas[0].model), opt=OptimizerState(optimizer, model),
            schedule_sampler=schedule_sampler, guard=guard, **extra_emas)
        start_step, changes = resume(checkpoints, resumed, args, config, flags) if resumed else (0, [])
        end_step = min(flags.epochs * (len(dataset) // flags.global_batch_size), flags.max_steps or math.inf)
        batches = StepBatchSampler(len(dataset), flags.global_batch_size, rows, flags.global_seed, start_step, end_step,
                                   flips=flip)
        guard.sample_indices, guard.logger = batches.items, open_log(run_dir)
        if distributed.is_rank0():
            for line in (*opening_lines(flags, args, run_dir, model, dataset, batches, resumed), *log_lines, *warnings,
                         *changes, *check_autoencoder(autoencoder, dataset.examples(NUM_CHECK_IMAGES), device),
                         plan_line(flags, batches)):
                guard.logger.info(line)
    rng = BatchRNG(flags.global_seed, flags.global_batch_size, rows, device)
    train_step = TrainStep(model, network, autoencoder, objective, schedule_sampler, optimizer, emas, guard, rng,
                           flags.grad_accum_steps, flags.max_grad_norm, compute)
    if evaluator:
        with distributed.raise_on_all_ranks():
            evaluator.begin(run_dir, start_step, guard.logger.info)
    return train_step, dataset, batches, checkpoints, evaluator, guard.logger


def train(flags, signals, train_step, dataset, batches, checkpoints, evaluator, logger):
    """Train from `batches.start_step` to `batches.end_step`.

    Raises:
        Stopped: After a signal, with everything saved.
    """
    warn = logger.info if distributed.is_rank0() else functools.partial(print, file=sys.stderr, flush=True)
    corrupt_images = CorruptImageLog(flags.max_bad_images, os.path.join(checkpoints.run_dir, "bad_images.txt"), warn)
    start_step, end_step = batches.start_step, batches.end_step
    train_step.network.train()
    with (distributed.collective_timeout("training", flags.dist_timeout),
          MetricLogger(logger, checkpoints.run_dir, start_step, end_step, flags.global_batch_size) as metrics):
        with distributed.raise_on_all_ranks():
            loader = PrefetchLoader(dataset, batches, flags.num_workers, distributed.device(), corrupt_images.add)
        faults = FaultTolerance(signals, loader, train_step.guard, checkpoints)
        if evaluator and start_step and is_due(start_step, flags.eval_every) and evaluator.lacks(start_step):
            evaluate(start_step, evaluator, train_step, checkpoints, metrics, signals, is_saved=True)
        for step, (images, cond) in enumerate(loader, start=start_step):
            if step % batches.steps_per_epoch == 0 and batches.steps_per_epoch >= flags.log_every:
                logger.info(f"Beginning epoch {step // batches.steps_per_epoch}...")
            done = step + 1
            with distributed.collective_timeout(f"training step {done}", flags.dist_timeout):
                losses, grad_norm, is_applied = train_step(step, images, cond)
                metrics.update(losses, is_applied)
                is_last = faults.poll() or done == end_step
            if is_due(done, flags.log_every) or is_last:
                train_step.guard.settle()
                metrics.log(done, grad_norm=grad_norm, learning_rate=flags.lr)
            if is_saved := is_due(done, flags.ckpt_every) or is_last or faults.has_write_failed:
                path = checkpoints.save(done)
                logger.info(f"{'Saving' if flags.async_save else 'Saved'} checkpoint to {path}")
            is_observed = is_due(done, flags.sample_every) or (evaluator and is_due(done, flags.eval_every))
            if is_observed or is_last:
                metrics.warn_once("at the end" if is_last else "while training",
                                  train_step.emas[0].describe_start(done))
            if is_due(done, flags.sample_every):
                preview(done, train_step, dataset, metrics)
            if evaluator and is_due(done, flags.eval_every) and not faults.is_stopping():
                evaluate(done, evaluator, train_step, checkpoints, metrics, signals, is_saved)
            if is_last:
                faults.finish(done, path, end_step, logger.info)
        logger.info("Done!")


def is_due(step, every):
    """Return whether something that happens every so often, or never (None, 0), happens after `step` steps."""
    return bool(every) and step % every == 0


def preview(step, train_step, dataset, metrics):
    """Log a grid of EMA samples. Images that are not finite do not end the run."""
    with metrics.paused(), distributed.raise_on_all_ranks(), train_step.emas[0].full() as ema:
        if distributed.is_rank0():
            try:
                metrics.log_images(step, *sample_preview(ema, train_step.autoencoder, dataset.class_names))
            except UserError as error:
                metrics.logger.info(f"WARNING: (step={step:07d}) no samples are shown; training continues: {error}")


def evaluate(step, evaluator, train_step, checkpoints, metrics, signals, is_saved):
    """Score EMA samples, log the scores, and keep the best checkpoint. A failure does not end the run."""
    try:
        with metrics.paused(), train_step.emas[0].full(), rename_arguments(**EVALUATION_FLAGS):
            scores = evaluator(step, lambda: checkpoints.save_best(step, is_saved), lambda: signals.received)
    except Exception as error:  # the same on all ranks, since they agree on errors
        metrics.logger.info(f"WARNING: (step={step:07d}) the evaluation failed; training continues: "
                            f"{str(error) or type(error).__name__}")
    else:
        if scores is None:
            metrics.logger.info(f"(step={step:07d}) the evaluation was interrupted by a signal")
        else:
            metrics.log_scores(step, scores)


def build_evaluation(flags, ema, autoencoder, dataset, rows, compute):
    """Build the evaluator of EMA samples that the --eval flags describe. Called by all ranks."""
    with rename_arguments(**EVALUATION_FLAGS):
        with distributed.raise_on_all_ranks():
            pipeline = build_pipeline(ema.full_model, autoencoder, flags.eval_sampling_steps, flags.eval_cfg_scale,
                                      compute=compute)
        metadata = dict(model=flags.model, weights="ema", ema_decay=ema.decay, image_size=dataset.image_size,
                       vae=autoencoder.name) | collect_environment(distributed.device())
        images = GeneratedImages(pipeline, len(dataset.class_names), flags.eval_samples, flags.global_seed,
                                 model_metadata=metadata)
        batch_size = (rows.stop - rows.start) // flags.grad_accum_steps
        return build_evaluator(flags.eval_features, flags.eval_reference, images, batch_size, dataset.image_size)


def open_dataset(flags):
    """Open the images of --data-path or the latents of --features-path. Called by all ranks."""
    if flags.features_path:
        dataset = LatentCache(flags.features_path)
    else:
        dataset = build_dataset(flags.data_path, flags.image_size, flags.max_bad_images, flags.num_classes,
                                collective=True)
    source = flags.features_path or flags.data_path
    if len(dataset.class_names) > flags.num_classes:
        raise ArgumentError(f"{source} has {len(dataset.class_names)} classes", num_classes=flags.num_classes)
    if len(dataset) < flags.global_batch_size:
        raise ArgumentError(f"{source} has {len(dataset)} images, not enough for one batch",
                            global_batch_size=flags.global_batch_size)
    if flags.flip and flags.features_path and not dataset.flips:
        raise ArgumentError(f"the cache {source} was made without mirror images (--no-flip)", flip=None)
    return dataset


def open_autoencoder(flags, explicit_args, dataset, device):
    """Return the data set (moved to the device by --cache-on-device), its autoencoder, and whether to flip images."""
    if flags.features_path:
        vae, image_size = (getattr(flags, name) if name in explicit_args else None for name in ("vae", "image_size"))
        autoencoder = load_cached_latents(dataset, vae, image_size, device,
                                          needs_decoder=bool(flags.sample_every or flags.eval_every))
        if flags.cache_on_device:
            dataset = dataset.to_device(device)
    else:
        autoencoder = load_autoencoder(flags.vae, dataset.channels, device)
    return dataset, autoencoder, dataset.flips if flags.flip is None else flags.flip


def build_model(flags, dataset, autoencoder):
    """Build the DiT of --model with any sizes given beside it; the same initial weights on every rank."""
    sizes = {name: getattr(flags, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    side = latent_size(autoencoder, dataset.image_size)
    patch_size = flags.patch_size or DiT_models[flags.model].keywords["patch_size"]
    check_run_memory(flags, distributed.device(), (side // patch_size)**2, autoencoder.channels * side**2)
    torch.manual_seed(derive_seed(flags.global_seed, WEIGHTS))
    try:
        return networks.build_dit(
            flags.model, flags.conditioning, input_size=side, in_channels=autoencoder.channels,
            num_classes=flags.num_classes,
            class_dropout_prob=flags.class_dropout_prob, learn_sigma=flags.learn_sigma,
            **{name: value for name, value in sizes.items() if value is not None})
    except ValueError as error:
        named = {name: value for name, value in sizes.items() if value is not None and name in str(error)}
        raise ArgumentError(f"{error}", **named, model=flags.model, image_size=dataset.image_size) from None


def distribute(model, flags, compute):
    """Place the model on all ranks, in DDP or sharded; return the network to train, and an `EMA` per decay."""
    if not flags.fsdp:
        network = distributed.data_parallel(model)
        return network, [EMA(model, decay, flags.ema_warmup) for decay in flags.ema_decay]
    mesh = fsdp.init_mesh(flags.fsdp, flags.dist_timeout)
    emas = [EMA(model, decay, flags.ema_warmup) for decay in flags.ema_decay]  # a sharded model cannot be copied
    for ema in emas:
        ema.shard(mesh)
    return fsdp.shard_model(model, mesh, compute.precision), emas


def resume(checkpoints, path, args, config, flags):
    """Restore a run; return its step, and warnings about changes that --allow-config-change accepts."""
    changes = []

    def check(stored):
        changes.extend(find_config_changes(stored, args, config))
        changes.extend(match_averages(stored, flags.ema_decay))
        if changes and not flags.allow_config_change:
            raise UserError(f"{'; '.join(changes)}. Another value makes another run: give the old one, or pass "
                            "--allow-config-change")

    try:
        step = checkpoints.restore(path, check)
    except UserError:
        if distributed.is_rank0():
            remove_unused_run_dir(checkpoints.run_dir)
        raise
    return step, [f"WARNING: {change} (--allow-config-change)" for change in changes]


if __name__ == "__main__":
    run_command(main)
