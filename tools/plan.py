"""Plan a training run before it starts: memory, whether it fits, duration. Needs no GPU; nothing is computed.

    python -m tools.plan --gpu h100 --gpus 8                   # the paper's DiT-XL/2 at batch 256
    python -m tools.plan --gpu a100-40 --precision bf16 --grad-checkpointing --global-batch-size 64
    python -m tools.plan --model all --gpu h200                # a table of all sizes

Flags are those of train.py where they mean the same. The tensors of a training step are traced without their values;
docs/planning.md says what is counted and what is not.
"""
import common.startup  # noqa: F401

import argparse
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import torch

import models
from autoencoder.vae import latent_size
from common.cli import HelpFormatter, fraction, number, parse_args, positive_int
from common.compute import PRECISIONS, ComputeConfig
from common.errors import ArgumentError, run_command
from common.files import format_bytes
from common.flops import GPUS, count_multiply_adds, count_parameters, training_step_flops
from data.latent_cache.manifest import DTYPES, cache_bytes
from networks import CONDITIONINGS, build_dit
from tools.memory import estimate_step_memory

IMAGENET = 1_281_167  # training images
PAPER_STEPS = [400_000, 7_000_000]
# Beyond these, tracing would take minutes, or numbers of bytes would overflow.
LARGEST = dict(depth=1000, hidden_size=100_000, patch_size=10_000, image_size=100_000, num_classes=10**8, images=10**10)
VAES = {"ema": (4, 8), "mse": (4, 8), "none": (3, 1)}  # channels and stride, so that the VAE itself is not needed


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=[*models.DiT_models, "all"], default="DiT-XL/2",
                       help="architecture, whose sizes the next flags override; all: a table")
    group.add_argument("--depth", type=positive_int, help="number of blocks")
    group.add_argument("--hidden-size", type=positive_int, help="width")
    group.add_argument("--num-heads", type=positive_int, help="attention heads")
    group.add_argument("--patch-size", type=positive_int, help="latents per side of a token")
    group.add_argument("--conditioning", choices=CONDITIONINGS, default="adaln-zero", help="block type")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels per side")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="number of classes")
    group.add_argument("--vae", type=vae, default="ema", metavar="NAME",
                       help="ema, mse, none (pixels), or channels and stride, as in 16x8")
    group = parser.add_argument_group("training")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images per step, over all GPUs")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, help="microbatches per step")
    group.add_argument("--precision", choices=PRECISIONS, default="tf32", help="precision of the network")
    group.add_argument("--grad-checkpointing", type=fraction, nargs="?", const=1.0, default=0.0, metavar="SHARE",
                       help="share of the blocks that recompute activations, to save memory; without a value: all")
    group.add_argument("--fused-adamw", action="store_true", help="the optimizer step in one kernel")
    group.add_argument("--fsdp", action="store_true", help="shard weights, moments and EMA over all GPUs")
    group.add_argument("--steps", type=positive_int, nargs="+", default=PAPER_STEPS, help="training lengths to time")
    group = parser.add_argument_group("hardware")
    group.add_argument("--gpu", choices=GPUS, default="h100", help="model of the GPUs")
    group.add_argument("--gpus", type=positive_int, default=1, help="number of GPUs, on one machine or several")
    group.add_argument("--mfu", type=positive_fraction, default=0.45,
                       help="share of the peak rate that training reaches, as python -m benchmarks.train measures it")
    group.add_argument("--memory-share", type=positive_fraction, default=0.9,
                       help="share of the memory to plan with; CUDA, libraries and fragmentation take the rest")
    group = parser.add_argument_group("latent cache")
    group.add_argument("--images", type=positive_int, default=IMAGENET, help="images of the data set")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="store flipped images too")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="type of the stored numbers")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, FLOPs and hours")
    return parser


@number
def positive_fraction(text):
    """Parse a number in (0, 1]."""
    value = fraction(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} must be above 0, up to 1")
    return value


def vae(text):
    """Parse a name in VAES, or CHANNELSxSTRIDE."""
    if text not in VAES and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text} is unknown; choose {', '.join(VAES)}, or channels and stride, as in "
                                         "16x8")
    return text


def main():
    """Print the plan of the command line."""
    flags, _ = parse_args(build_parser())
    for name, largest in LARGEST.items():
        if (getattr(flags, name) or 0) > largest:
            raise ArgumentError(f"plans are made up to {largest:,}.", **{name: getattr(flags, name)})
    gpu, microbatch = GPUS[flags.gpu], microbatch_size(flags)
    if flags.fsdp and flags.gpus == 1:
        raise ArgumentError("there is nothing to shard over. Use several GPUs, or leave --fsdp out.", fsdp=True, gpus=1)
    names = list(models.DiT_models) if flags.model == "all" else [flags.model]
    plans = (plan(name, flags, gpu, microbatch) for name in names)
    if flags.json:
        print(json.dumps(dict(flags=vars(flags), gpu=asdict(gpu), images_in_a_pass=microbatch, models=list(plans))))
        return
    lines = format_table if flags.model == "all" else format_plan
    for line in lines(plans, flags, gpu, microbatch):
        print(line, flush=True)


def microbatch_size(flags):
    """Return the images per pass on each GPU."""
    passes = flags.gpus * flags.grad_accum_steps
    if flags.global_batch_size % passes:
        raise ArgumentError(f"the batch cannot be split evenly. Make it a multiple of {passes}.",
                            global_batch_size=flags.global_batch_size, gpus=flags.gpus,
                            grad_accum_steps=flags.grad_accum_steps)
    return flags.global_batch_size // passes


def plan(name, flags, gpu, microbatch):
    """Return all numbers of one model as plain values: bytes, FLOPs, seconds, hours."""
    channels, stride = VAES.get(flags.vae) or map(int, flags.vae.split("x"))
    size = latent_size(SimpleNamespace(name=flags.vae, stride=stride), flags.image_size)
    overrides = {key: getattr(flags, key) for key in ("depth", "hidden_size", "num_heads", "patch_size")
                 if getattr(flags, key) is not None}

    def build():
        return build_dit(name, conditioning=flags.conditioning, input_size=size, in_channels=channels,
                         num_classes=flags.num_classes, **overrides)

    try:
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        named = {key: value for key, value in overrides.items() if key in str(error)}
        raise ArgumentError(f"{error}.", **named, model=name, image_size=flags.image_size) from None
    multiply_adds = count_multiply_adds(model)
    step_flops = training_step_flops(multiply_adds, flags.global_batch_size)
    step_seconds = step_flops / (flags.mfu * flags.gpus * getattr(gpu, flags.precision))
    shares = [flags.grad_checkpointing] if flags.model == "all" else sorted({0.0, flags.grad_checkpointing or 1.0})
    cache = None if flags.vae == "none" else cache_bytes(flags.images, 1 + flags.flip, channels, size, flags.dtype)
    return dict(
        model=name, latents=[channels, size, size], tokens=model.num_tokens, parameters=count_parameters(model),
        gflops=multiply_adds / 1e9, step_flops=step_flops, step_seconds=step_seconds,
        memory=[memory(build, flags, gpu, microbatch, share) for share in shares],
        hours={steps: steps * step_seconds / 3600 for steps in flags.steps}, latent_cache=cache)


def memory(build, flags, gpu, microbatch, checkpointed):
    """Return the bytes on each GPU if this share of the blocks is checkpointed, and the global batch that fits."""
    estimate = estimate_step_memory(build, ComputeConfig(flags.precision), checkpointed, flags.grad_accum_steps,
                                    flags.fused_adamw)
    usable = int(flags.memory_share * gpu.memory)
    peak = estimate.peak(microbatch, flags.gpus, flags.fsdp)
    largest = estimate.largest_batch(usable, flags.gpus, flags.fsdp) * flags.gpus * flags.grad_accum_steps
    return dict(grad_checkpointing=checkpointed, **estimate.persistent(flags.gpus, flags.fsdp),
                activations=estimate.activations(microbatch, flags.fsdp), at_most=peak, usable=usable,
                fits=peak <= usable, largest_global_batch_size=largest)


def format_plan(plans, flags, gpu, microbatch):
    """Yield the lines of a page with the numbers of one model."""
    (plan,) = plans
    row, cache = plan["memory"][0], plan["latent_cache"]
    parts = dict(weights=row["weights"], gradients=row["gradients"], moments=row["optimizer"], EMA=row["ema"])
    if flags.fsdp:
        parts["FSDP: gathered at a time"] = row["exchange"]
    yield (f"{plan['model']} at {flags.image_size} pixels: latents {'x'.join(map(str, plan['latents']))}, "
           f"{plan['tokens']:,} tokens, {plan['parameters']:,} parameters, {plan['gflops']:.2f} Gflops (multiply-adds "
           "per image)\n")
    yield f"Memory of each GPU: {format_setup(flags, gpu, microbatch)}"
    yield "  " + "   ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    yield (f"  {'':24s} {'activations':>12s}{'peak':>12s}   {'of ' + format_bytes(row['usable']):14s}"
           f"{'largest batch':>13s}")
    for row in plan["memory"]:
        yield (f"  {format_checkpointing(row['grad_checkpointing']):24s} {format_bytes(row['activations']):>12s}"
               f"{format_bytes(row['at_most']):>12s}   {'fits' if row['fits'] else 'does not fit':14s}"
               f"{row['largest_global_batch_size']:>13,}")
    yield (f"\nTime: {plan['step_flops'] / 1e12:,.1f} TFLOP per step, {plan['step_seconds']:.3g} s at "
           f"{format_rate(flags, gpu)}")
    for steps, hours in plan["hours"].items():
        yield f"  {steps:>9,} steps {hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 48 else "")
    if cache is not None:
        yield (f"\nLatent cache of {flags.images:,} images: {format_bytes(cache)} ({flags.dtype}, "
               f"{'with' if flags.flip else 'without'} flipped images)")


def format_table(plans, flags, gpu, microbatch):
    """Yield the lines of all models, each as soon as it is known."""
    yield (f"{format_setup(flags, gpu, microbatch)}, {format_checkpointing(flags.grad_checkpointing)}; time at "
           f"{format_rate(flags, gpu)}")
    usable = "of " + format_bytes(flags.memory_share * gpu.memory)
    yield (f"{'model':10s}{'parameters':>14s}{'Gflops':>9s}{'tokens':>8s}{'activations':>13s}{'peak':>10s}{usable:>14s}"
           f"{'largest batch':>15s}{'TFLOP per step':>16s}"
           + "".join(f"{f'{steps:,} steps':>18s}" for steps in flags.steps))
    for plan in plans:
        (row,) = plan["memory"]
        yield (f"{plan['model']:10s}{plan['parameters']:>14,}{plan['gflops']:>9.2f}{plan['tokens']:>8,}"
               f"{format_bytes(row['activations']):>13s}{format_bytes(row['at_most']):>10s}"
               f"{'fits' if row['fits'] else 'does not fit':>14s}{row['largest_global_batch_size']:>15,}"
               f"{plan['step_flops'] / 1e12:>16,.1f}"
               + "".join(f"{f'{hours:,.1f} h':>18s}" for hours in plan["hours"].values()))
    if flags.vae != "none":
        yield f"latent cache of {flags.images:,} images: {format_bytes(plan['latent_cache'])}"


def format_setup(flags, gpu, microbatch):
    """Return batch, GPUs and precision in words."""
    batch = f"batch {flags.global_batch_size:,}"
    if flags.grad_accum_steps > 1:
        batch += f" in {flags.grad_accum_steps} microbatches"
    gpus = f"{flags.gpus} x {gpu.name}"
    if flags.gpus > 1:
        gpus += f" by {'FSDP' if flags.fsdp else 'DDP'}"
    if flags.gpus * flags.grad_accum_steps > 1:
        gpus += f", {microbatch:,} at once on each"
    return f"{batch} on {gpus}, {flags.precision}"


def format_rate(flags, gpu):
    """Return the assumed rate in words."""
    return f"{flags.mfu:.0%} of {flags.gpus} x {getattr(gpu, flags.precision) / 1e12:g} TFLOP/s (--mfu)"


def format_checkpointing(share):
    """Return the flag of a share of checkpointed blocks."""
    return f"--grad-checkpointing {share:g}" if share else "no checkpointing"


if __name__ == "__main__":
    run_command(main)
