"""Flags of the commands that sample."""
import argparse

from common.cli import channels, fraction, guidance_scale, positive_int, sampling_steps
from models import DiT_models

TRAINED_TIMESTEPS = 1000


def timestep(text):
    value = int(text)
    if not 0 <= value < TRAINED_TIMESTEPS:
        raise argparse.ArgumentTypeError(f"timesteps are 0 .. {TRAINED_TIMESTEPS - 1}, not {text}")
    return value


timestep.__name__ = "number"


def add_model_flags(parser, vae, ckpt=True):
    """Which model to sample from; published defaults. ckpt=False: the command names the checkpoint in its own way."""
    group = parser.add_argument_group("model (a checkpoint of train.py says all this itself)")
    if ckpt:
        group.add_argument("--ckpt", help="a .pt or .safetensors file; default: the published DiT-XL/2 of --image-size")
    group.add_argument("--model", choices=DiT_models, default="DiT-XL/2", help="architecture")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="that it was trained on")
    group.add_argument("--vae", default=vae, help="ema, mse, a diffusers directory or hub name, or none (pixels)")


def add_sampling_flags(parser, cfg_scale):
    """How to sample; published defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=guidance_scale, default=cfg_scale, help="guidance; 1: none")
    group.add_argument("--cfg-channels", type=channels, default=None,
                       help="how many latent channels are guided, or all; default: 3 of 4 (as published), else all")
    group.add_argument("--cfg-interval", type=timestep, nargs=2, metavar=("LOW", "HIGH"),
                       help="guide only at timesteps LOW to HIGH of 0 .. 999; default: at all")
    group.add_argument("--num-sampling-steps", type=sampling_steps, default=250, help="as in 250, or ddim50")
    group.add_argument("--sampler", choices=["ddpm", "ddim"], help="default: ddpm, or ddim with ddimN steps")
    group.add_argument("--eta", type=fraction, default=0.0, help="noise of ddim: 0 deterministic, 1 as ddpm")


def sampling_options(flags):
    """What the sampling flags say, as arguments of `build_pipeline`."""
    return dict(num_steps=flags.num_sampling_steps, cfg_scale=flags.cfg_scale, cfg_channels=flags.cfg_channels,
                cfg_interval=flags.cfg_interval and tuple(flags.cfg_interval), sampler=flags.sampler, eta=flags.eta)
