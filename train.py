"""Train a DiT.

    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --features-path /path/to/latents
    python train.py --data-path digits                   # no GPU, no download: minutes on a laptop

Without flags this is the paper's recipe: AdamW, learning rate 1e-4, batch 256, EMA 0.9999, horizontal flips.
"""
import argparse
import contextlib
import math
import os
from dataclasses import dataclass

import torch

import models
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from runtime import data, experiment, latent_cache, latents, processes
from runtime.errors import UserError, run_command
from runtime.flags import HelpFormatter, decay, fraction, non_negative_int, parse, positive_float, positive_int
from runtime.generate import SampleNoise, image_maker
from runtime.randomness import LABEL_DROP, NOISE, POSTERIOR, WEIGHTS, BatchRandomness, seed_of
from runtime.training_state import TrainingState

# What --data-path digits means for the flags that are not typed: its format, and a small model with what suits it.
DIGITS = dict(image_size=8, num_classes=10, vae="none", num_workers=0)
DIGITS_MODEL = dict(model="DiT-S/2", depth=4, hidden_size=96, num_heads=4, global_batch_size=64, lr=4e-3,
                    ema_decay=0.997, epochs=136, ckpt_every=1000)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="folder with a folder of images a class, or: digits")
    source.add_argument("--features-path", help="instead: a latent cache of extract_features.py")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="rows of the class table")
    group.add_argument("--vae", default="ema", help="ema, mse, a diffusers directory or hub name, or none (pixels)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images (not digits)")
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
    group = parser.add_argument_group("results and faults")
    group.add_argument("--results-dir", default="results", help="where experiments get their folders")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    group.add_argument("--ckpt-every", type=positive_int, default=50000, help="steps")
    group.add_argument("--sample-every", type=positive_int, help="steps between grids of EMA samples")
    group.add_argument("--resume", metavar="PATH", help="a checkpoint, an experiment's folder, or: auto (the latest)")
    return parser


def main():
    flags, given = parse(build_parser())
    if flags.data_path == "digits":
        defaults = DIGITS if "model" in given else DIGITS | DIGITS_MODEL
        typed = given | {"epochs"} if "max_steps" in given else given
        vars(flags).update({name: value for name, value in defaults.items() if name not in typed})
    if os.path.isdir(flags.vae):
        flags.vae = os.path.abspath(flags.vae)  # checkpoints keep it, and are sampled from elsewhere
    accelerator = processes.start()
    train(accelerator, flags, given)
    accelerator.end_training()


def train(accelerator, flags, given):
    device, is_main = accelerator.device, accelerator.is_main_process
    with processes.together(accelerator):
        rows = own_rows(flags, accelerator)
        dataset, codec = open_dataset(flags, given, device)
        model = build_model(flags, codec).to(device)
    network = accelerator.prepare(model)  # the model itself, or behind DDP where there are several processes
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0)
    diffusion = create_diffusion(timestep_respacing="")
    schedule_sampler = create_named_schedule_sampler(flags.schedule_sampler, diffusion)
    state = TrainingState(model, optimizer, schedule_sampler, flags.ema_decay, vars(flags),
                          dict(image_channels=dataset.channels, class_names=dataset.class_names))

    folder, resumed = processes.on_main(accelerator, lambda: experiment.open_folder(
        flags.results_dir, flags.model, flags.resume))
    with processes.together(accelerator):
        first_step, changes = state.restore(resumed) if resumed else (0, [])
    steps_per_epoch = len(dataset) // flags.global_batch_size
    last_step = min(flags.epochs * steps_per_epoch, flags.max_steps or math.inf)
    logger = experiment.open_log(folder, is_main)
    if is_main:
        for line in opening_lines(flags, folder, accelerator, model, dataset, resumed, first_step, last_step, changes):
            logger.info(line)
        for line in latents.first_look(codec, dataset.examples(latents.LOOKED_AT), device):
            logger.info(line)

    bad_images = data.BadImages(flags.max_bad_images, os.path.join(folder, "bad_images.txt"), logger.info)
    batches = data.GlobalBatches(len(dataset), flags.global_batch_size, rows, flags.global_seed, first_step, last_step,
                                 flips=flags.flip)
    random = BatchRandomness(flags.global_seed, flags.global_batch_size, rows, device)
    training_step = TrainingStep(accelerator, network, codec, diffusion, schedule_sampler, random,
                                 parts=flags.grad_accum_steps)
    network.train()
    with experiment.Monitor(accelerator, logger, folder, first_step, last_step, flags.global_batch_size) as monitor:
        loader = data.load_batches(dataset, batches, flags.num_workers, device, bad_images.add)
        for step, (images, labels) in enumerate(loader, start=first_step):
            if step % steps_per_epoch == 0 and steps_per_epoch >= flags.log_every:
                logger.info(f"Beginning epoch {step // steps_per_epoch}...")
            losses = training_step.backward(step, images, labels)
            done = step + 1
            show = done % flags.log_every == 0 or done == last_step
            grad_norm = gradient_norm(model, flags.max_grad_norm) if show or flags.max_grad_norm else None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.ema.update(model)

            monitor.add(losses)
            if show:
                monitor.show(done, grad_norm=grad_norm, learning_rate=flags.lr)
            if is_main and (done % flags.ckpt_every == 0 or done == last_step):
                path = os.path.join(folder, "checkpoints", f"{done:07d}.pt")
                state.save(path, done)
                logger.info(f"Saved checkpoint to {path}")
            if is_main and flags.sample_every and done % flags.sample_every == 0:
                monitor.show_images(done, *sample_grid(state.ema.model, codec, dataset.class_names))
        logger.info("Done!")


@dataclass
class TrainingStep:
    """The gradients of a training step: encode, add noise, predict it, compare (algorithm 1 of DDPM).

    Every random number comes from `random`, so that it follows from (seed, step, position in the global batch).
    parts  the rows are computed in so many parts, to save memory
    """

    accelerator: object
    network: torch.nn.Module
    codec: object
    diffusion: object
    schedule_sampler: object
    random: BatchRandomness
    parts: int

    def backward(self, step, images, labels):
        """Add the gradients over this process' rows of the global batch.

        images  (n, C, H, W) in [-1, 1], or what else the codec takes; labels (n,)
        return  dictionary of scalars on the device: loss, mse, vb, weighted means over the rows
        """
        model = self.accelerator.unwrap_model(self.network)
        latent_shape = (model.in_channels, *model.x_embedder.input_size)
        t, weights = self.random.timesteps(step, self.schedule_sampler)
        noise = self.random.normal(NOISE, step, latent_shape)
        posterior_noise = self.random.normal(POSTERIOR, step, latent_shape) if self.codec.is_random else noise
        drop = self.random.uniform(LABEL_DROP, step) < model.y_embedder.dropout_prob
        has_null_class = model.y_embedder.has_null_class

        all_terms = []
        share = len(labels) // self.parts
        for part in range(self.parts):
            rows, is_last = slice(part * share, (part + 1) * share), part == self.parts - 1
            condition = dict(y=labels[rows], force_drop_ids=drop[rows] if has_null_class else None)
            x = self.codec.encode(images[rows], posterior_noise[rows])
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.network):
                terms = self.diffusion.training_losses(self.network, x, t[rows], condition, noise[rows])
                ((terms["loss"] * weights[rows]).mean() / self.parts).backward()
            all_terms.append({name: values.detach() for name, values in terms.items()})
        terms = {name: torch.cat([terms[name] for terms in all_terms]) for name in all_terms[0]}
        self.schedule_sampler.update_with_local_losses(t, terms["loss"])
        return {name: (values * weights).mean() for name, values in terms.items()}


def own_rows(flags, accelerator):
    """The slice of the global batch that this process computes."""
    world, parts = accelerator.num_processes, flags.grad_accum_steps
    if flags.global_batch_size % (world * parts):
        raise UserError(f"--global-batch-size {flags.global_batch_size} cannot be shared by {world} processes "
                        f"in {parts} parts each (--grad-accum-steps): it must be a multiple of {world * parts}")
    share = flags.global_batch_size // world
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def open_dataset(flags, given, device):
    """The images of --data-path, or the latents of --features-path, and their codec.

    Flags that were not typed follow from the data. raise: `UserError` where those that were do not fit it.
    """
    if flags.features_path:
        cache = latent_cache.LatentCache(flags.features_path)
        codec = cache.codec(*(getattr(flags, name) if name in given else None for name in ("vae", "image_size")),
                            device=device, decodes=bool(flags.sample_every))
        flags.vae, flags.image_size = codec.name, cache.image_size
        dataset = cache.in_memory(device) if flags.features_in_memory else cache
    elif flags.features_in_memory:
        raise UserError("--features-in-memory needs --features-path: only a latent cache is kept on the device")
    else:
        dataset = data.open_data(flags.data_path, flags.image_size, flags.max_bad_images)
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
            num_classes=flags.num_classes, class_dropout_prob=flags.class_dropout_prob,
            **{name: value for name, value in sizes.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--model {flags.model} at --image-size {flags.image_size}: {error}") from None


def gradient_norm(model, max_norm):
    """The gradient's norm (a scalar on the device), after which it is clipped to max_norm, if any."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)


def opening_lines(flags, folder, accelerator, model, dataset, resumed, first_step, last_step, changes):
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
        yield f"--resume auto: no checkpoint of {flags.model} in {flags.results_dir}, starting from the beginning"
    yield from (f"WARNING: {change}" for change in changes)
    limit = "--max-steps" if last_step == flags.max_steps else f"--epochs {flags.epochs}"
    yield f"Training for {last_step - first_step} steps, to step {last_step} ({limit})" if first_step < last_step else (
        f"Nothing to do: {first_step} steps are done, --epochs and --max-steps ask for {last_step}")


def sample_grid(model, codec, class_names, columns=4):
    """Samples of up to ten classes, one a row: images (N, C, H, W), and the number of columns.

    DDIM in 50 steps, guided as sample.py does; the same noise every time, so that grids can be compared.
    """
    classes = torch.linspace(0, len(class_names) - 1, min(10, len(class_names))).long()
    labels = classes.repeat_interleave(columns).to(model.pos_embed.device)
    make = image_maker(model, codec, "ddim50", cfg_scale=4.0 if model.y_embedder.has_null_class else 1.0)
    return make(labels, SampleNoise(0, range(len(labels)), labels.device)), columns


if __name__ == "__main__":
    run_command(main)
