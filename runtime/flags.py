"""Flags that several commands share, and the kinds of values that flags take."""
import argparse
from dataclasses import replace

from models import DiT_models

from .speed import ATTENTIONS, PRECISIONS, Speed, fastest, why_no_compiler

TRAINED_TIMESTEPS = 1000


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and every flag's default."""

    def _get_help_string(self, action):
        text = action.help or ""
        is_off = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if is_off or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".strip()


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def non_negative_int(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number in 0 .. 2^63 - 1")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def minutes(text):
    value = positive_float(text)
    if value > 1e6:
        raise argparse.ArgumentTypeError(f"{text} minutes are more than a year")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 .. 1")
    return value


def decay(text):
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("an average with decay 1 never leaves the initial weights; it must be below 1")
    return value


def guidance_scale(text):
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"guidance starts at 1, which means none; {text} is not possible")
    return value


def timestep(text):
    value = int(text)
    if not 0 <= value < TRAINED_TIMESTEPS:
        raise argparse.ArgumentTypeError(f"timesteps are 0 .. {TRAINED_TIMESTEPS - 1}, not {text}")
    return value


def channels(text):
    return text if text == "all" else positive_int(text)


def sampling_steps(text):
    """A number of steps, or "ddimN"."""
    return text if text.startswith("ddim") else positive_int(text)


for kind in (positive_int, non_negative_int, positive_float, minutes, fraction, decay, guidance_scale, timestep,
             channels, sampling_steps):
    kind.__name__ = "number"  # argparse says "invalid number value: 'x'" where the text is none


def parse(parser, argv=None):
    """Parse the command line; returns the flags, and the names of those that the user typed."""
    flags = parser.parse_args(argv)
    untouched = object()
    probe = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags), untouched)))
    return flags, {name for name, value in vars(probe).items() if value is not untouched}


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


def sampling_of(flags):
    """What the sampling flags say, as arguments of `image_maker`."""
    return dict(num_steps=flags.num_sampling_steps, cfg_scale=flags.cfg_scale, cfg_channels=flags.cfg_channels,
                cfg_interval=flags.cfg_interval and tuple(flags.cfg_interval), sampler=flags.sampler, eta=flags.eta)


def add_feature_flags(parser):
    """In which feature space sets of images are compared."""
    group = parser.add_argument_group("features")
    group.add_argument("--features", default="inception",
                       help="inception (FID and the rest), pixels (up to 32 x 32), or a TorchScript module's file")
    group.add_argument("--inception", metavar="FILE", help="weights of Inception; default: downloaded once")
    return group


def add_speed_flags(parser):
    """How the network is computed; without them as published. Returns the group."""
    group = parser.add_argument_group("speed")
    group.add_argument("--fast", action="store_true", help="what is fastest on this device; flags that are typed win")
    group.add_argument("--precision", choices=PRECISIONS, default="tf32",
                       help="of the network: tf32 where the GPU has it (as published), fp32, or bf16 by autocast")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="by torch.compile")
    group.add_argument("--cuda-graphs", action="store_true",
                       help="with --compile: launch a pass as a whole; for small models, and sampling few at once")
    group.add_argument("--attention", choices=ATTENTIONS, default="auto", help="which kernel")
    return group


def speed_of(flags, given, device, log):
    """The `Speed` that the flags say, checked on this device. --fast sets those that were not typed, and logs them."""
    if flags.fast:
        best = vars(fastest(device)) | dict(fused_adamw=True)
        vars(flags).update({name: value for name, value in best.items() if name not in given and hasattr(flags, name)})
        more = [f"--{name.replace('_', '-')}" for name in ("fused_adamw", "cuda_graphs") if getattr(flags, name, False)]
        log(" ".join(["--fast: --precision", flags.precision, "--compile" if flags.compile else "--no-compile",
                      "--attention", flags.attention, *more]))
    speed = Speed(flags.precision, flags.compile, flags.attention, flags.cuda_graphs)
    speed.check(device)
    if speed.compile and (reason := why_no_compiler(device)):
        log(f"WARNING: --compile: there is no working compiler here ({reason}); going on without it")
        speed = replace(speed, compile=False, cuda_graphs=False)
    return speed
