"""Flags of the commands that sample, and what they build."""
import argparse

from common.cli import (
    build_compute_config,
    channels,
    decay,
    fraction,
    guidance_scale,
    number,
    positive_int,
    sampling_steps,
)
from common.errors import ArgumentError
from models import DiT_models
from sampling.load_model import load_model
from sampling.pipeline import NUM_TRAINED_TIMESTEPS, SAMPLERS, build_pipeline, build_process, choose_sampler
from sampling.solvers import SPACINGS


@number
def timestep(text):
    """Parse a timestep of the trained process."""
    value = int(text)
    if not 0 <= value < NUM_TRAINED_TIMESTEPS:
        raise argparse.ArgumentTypeError(f"timesteps are 0 .. {NUM_TRAINED_TIMESTEPS - 1}, not {text}")
    return value


def add_model_flags(parser, vae, ckpt=True):
    """Add the flags of the model to sample from, with the published defaults; `vae` is that of --vae."""
    group = parser.add_argument_group("model (checkpoints of train.py need none of these)")
    if ckpt:
        group.add_argument("--ckpt", help="a .pt or .safetensors file; default: the published DiT-XL/2 of --image-size")
    group.add_argument("--model", choices=DiT_models, default="DiT-XL/2", help="architecture")
    group.add_argument("--image-size", type=positive_int, default=256, help="image size in pixels")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="number of classes of the training data")
    group.add_argument("--vae", default=vae,
                       help="autoencoder: ema, mse, a diffusers directory or hub name, or none (pixels)")
    group.add_argument("--ema-decay", type=decay,
                       help="which moving average of a checkpoint with several; default: its first")
    group.add_argument("--weights", choices=("ema", "model"),
                       help="the moving average, or the raw weights; default: the average if there is one")


def add_sampling_flags(parser, cfg_scale):
    """Add the flags of how to sample, with the published defaults; `cfg_scale` is that of --cfg-scale."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=guidance_scale, default=cfg_scale, help="scale of guidance; 1: none")
    group.add_argument("--cfg-channels", type=channels, default=None,
                       help="number of guided latent channels, or all; default: 3 of 4 (as published), else all")
    group.add_argument("--cfg-interval", type=timestep, nargs=2, metavar=("LOW", "HIGH"),
                       help="timesteps of 0 .. 999 with guidance; default: all")
    group.add_argument("--num-sampling-steps", type=sampling_steps, default=250,
                       help="number of sampling steps, such as 250, ddim50, dpm20, unipc10 or heun10")
    group.add_argument("--sampler", choices=SAMPLERS,
                       help="sampler; default: that of the steps, such as ddim with ddim50, else ddpm")
    group.add_argument("--timestep-spacing", choices=SPACINGS,
                       help=f"timesteps of dpm++, unipc and heun; default: {SPACINGS[0]}")
    group.add_argument("--eta", type=fraction, default=0.0, help="noise of ddim: 0 (deterministic) to 1 (as ddpm)")


def sampling_options(flags):
    """Return the values of the sampling flags, as arguments of `build_pipeline`, after checking the steps."""
    steps = str(flags.num_sampling_steps)
    try:
        sampler = choose_sampler(flags.sampler, steps)
        timesteps = build_process(steps, True, sampler, flags.timestep_spacing).timestep_map
    except ArgumentError as error:
        count = steps.removeprefix("ddim")
        is_possible = count != steps and count.isdecimal() and 1 < int(count[:9]) <= NUM_TRAINED_TIMESTEPS
        advice = f" Or take {count} steps by --num-sampling-steps {count} --sampler ddim." if is_possible else ""
        raise ArgumentError(error.args[0] + advice, **error.arguments) from None
    low, high = sorted(flags.cfg_interval or (0, NUM_TRAINED_TIMESTEPS))
    if flags.cfg_scale > 1 and not any(low <= timestep <= high for timestep in timesteps):
        nearest = min(timesteps, key=lambda timestep: min(abs(timestep - low), abs(timestep - high)))
        raise ArgumentError(f"none of the {len(timesteps)} timesteps that are sampled lies in it, so nothing would be "
                            f"guided. The nearest is {nearest}.", cfg_interval=flags.cfg_interval)
    return dict(num_sampling_steps=flags.num_sampling_steps, cfg_scale=flags.cfg_scale,
                cfg_channels=flags.cfg_channels, cfg_interval=flags.cfg_interval, sampler=flags.sampler, eta=flags.eta,
                timestep_spacing=flags.timestep_spacing)


def load_pipeline(flags, explicit_args, device, log=print):
    """Return the `LoadedModel` of the flags and the `SamplingPipeline` of it, and `log` a line about the model.

    The flags are those of `add_model_flags`, `add_sampling_flags` and `add_compute_flags`; `explicit_args` names those
    that were typed.
    """
    options = sampling_options(flags)
    loaded = load_model(flags.ckpt, flags.model, flags.image_size, flags.num_classes, flags.vae, explicit_args, device,
                        flags.ema_decay, flags.weights)
    log(loaded.description() + (f", average of decay {flags.ema_decay:g}" if flags.ema_decay is not None else ""))
    compute = build_compute_config(flags, device, log)
    return loaded, build_pipeline(loaded.model, loaded.autoencoder, **options, compute=compute)
