"""Before you train: how much memory, will it fit, how long will it take? Needs no GPU; nothing is computed.

    python plan.py --gpu h100 --gpus 8                         # the paper's DiT-XL/2 at batch 256
    python plan.py --gpu a100-40 --precision bf16 --grad-checkpointing --global-batch-size 64
    python plan.py --model all --gpu h200                      # a table of all sizes

Flags are those of train.py where they mean the same. Of a training step every tensor is followed, without its values;
docs/planning.md says what is counted, and what is not.
"""

import argparse
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import torch

import models
from autoencoder.vae import latent_size
from common.cli import HelpFormatter, fraction, positive_int
from common.compute import PRECISIONS, ComputeConfig
from common.errors import UserError, run_command
from common.files import format_bytes
from common.flops import GPUS, count_multiply_adds, count_parameters, training_step_flops
from data.latent_cache.manifest import DTYPES, cache_bytes
from networks import CONDITIONINGS, build_dit
from tools.memory import estimate_step_memory

IMAGENET = 1_281_167  # images to train on
PAPER_STEPS = [400_000, 7_000_000]
# Channels and stride, so that no VAE need be there; others by their numbers.
VAES = {"ema": (4, 8), "mse": (4, 8), "none": (3, 1)}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=[*models.DiT_models, "all"], default="DiT-XL/2",
                       help="its sizes, unless given; or a table of all")
    group.add_argument("--depth", type=positive_int, help="number of blocks")
    group.add_argument("--hidden-size", type=positive_int, help="width")
    group.add_argument("--num-heads", type=positive_int, help="attention heads")
    group.add_argument("--patch-size", type=positive_int, help="latents a side of a token")
    group.add_argument("--conditioning", choices=CONDITIONINGS, default="adaln-zero", help="type of the blocks")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--num-classes", type=positive_int, default=1000, help="rows of the class table")
    group.add_argument("--vae", type=vae, default="ema", metavar="NAME",
                       help="ema, mse, none (pixels), or as 16x8: channels, and pixels a latent")
    group = parser.add_argument_group("training")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step, over all GPUs")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, help="cut the batch in so many parts")
    group.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of the network")
    group.add_argument("--grad-checkpointing", type=fraction, nargs="?", const=1.0, default=0.0, metavar="SHARE",
                       help="compute activations of this share of the blocks twice, to save memory; alone: all")
    group.add_argument("--fused-adamw", action="store_true", help="the optimiser's step in one kernel")
    group.add_argument("--fsdp", action="store_true", help="share weights, moments and EMA between all GPUs")
    group.add_argument("--steps", type=positive_int, nargs="+", default=PAPER_STEPS, help="of which to tell the time")
    group = parser.add_argument_group("hardware")
    group.add_argument("--gpu", choices=GPUS, default="h100", help="which GPU")
    group.add_argument("--gpus", type=positive_int, default=1, help="how many, on one machine or several")
    group.add_argument("--mfu", type=share, default=0.45, help="share of the peak rate that training reaches: measure "
                       "it with benchmark.py train")
    group.add_argument("--memory-share", type=share, default=0.9,
                       help="of the memory that may be planned with; CUDA, libraries and gaps take the rest")
    group = parser.add_argument_group("latent cache")
    group.add_argument("--images", type=positive_int, default=IMAGENET, help="of the data set")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="also the mirror images")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="of what is stored")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes, FLOPs and hours")
    return parser


def share(text):
    value = fraction(text)
    if not value:
        raise argparse.ArgumentTypeError("0 is no share: it must be above 0, up to 1")
    return value


def vae(text):
    """A name in VAES, or CHANNELSxSTRIDE."""
    if text not in VAES and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text} is not known here: {', '.join(VAES)}, or numbers as in 16x8 "
                                         "(channels, pixels a latent)")
    return text


share.__name__ = "number"


def main():
    flags = build_parser().parse_args()
    chip, autoencoder = GPUS[flags.gpu], codec_of(flags.vae)
    images = images_in_a_pass(flags)
    if flags.fsdp and flags.gpus == 1:
        raise UserError("--fsdp shares the model between GPUs, and --gpus 1 is one alone: pass --gpus, or leave it out")
    names = list(models.DiT_models) if flags.model == "all" else [flags.model]
    plans = (plan(name, flags, autoencoder, chip, images) for name in names)
    if flags.json:
        print(json.dumps(dict(flags=vars(flags), gpu=asdict(chip), images_in_a_pass=images, models=list(plans))))
    elif flags.model == "all":
        for line in table(plans, flags, chip, images):
            print(line, flush=True)
    else:
        print(report(next(plans), flags, chip, images))


def codec_of(name):
    """What is to be known of the codec of --vae."""
    channels, stride = VAES.get(name) or map(int, name.split("x"))
    return SimpleNamespace(name=name, channels=channels, stride=stride)


def images_in_a_pass(flags):
    """Images at once on a GPU; a `UserError` where the batch cannot be shared so."""
    passes = flags.gpus * flags.grad_accum_steps
    if flags.global_batch_size % passes:
        raise UserError(f"--global-batch-size {flags.global_batch_size} cannot be shared by --gpus {flags.gpus} in "
                        f"--grad-accum-steps {flags.grad_accum_steps}: it must be a multiple of {passes}")
    return flags.global_batch_size // passes


def plan(name, flags, autoencoder, chip, images):
    """All numbers of one model, as plain values: bytes, FLOPs, seconds, hours."""
    build = builder(name, flags, autoencoder)
    try:
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        raise UserError(f"--model {name} at --image-size {flags.image_size}: {error}") from None
    products = count_multiply_adds(model)
    flops = training_step_flops(products, flags.global_batch_size)
    seconds = flops / (flags.mfu * flags.gpus * getattr(chip, flags.precision))
    side = latent_size(autoencoder, flags.image_size)
    shares = [flags.grad_checkpointing] if flags.model == "all" else sorted({0.0, flags.grad_checkpointing or 1.0})
    return dict(
        model=name, latents=[autoencoder.channels, side, side], tokens=model.x_embedder.num_patches,
        parameters=count_parameters(model), gflops=products / 1e9, step_flops=flops, step_seconds=seconds,
        memory=[memory(build, flags, chip, images, checkpointed) for checkpointed in shares],
        hours={steps: steps * seconds / 3600 for steps in flags.steps},
        latent_cache=None if flags.vae == "none" else cache_bytes(flags.images, 1 + flags.flip, autoencoder.channels, side,
                                                                  flags.dtype))


def builder(name, flags, autoencoder):
    """() -> the network that train.py would build."""
    given = {size: getattr(flags, size) for size in ("depth", "hidden_size", "num_heads", "patch_size", "conditioning")}
    sizes = dict(input_size=latent_size(autoencoder, flags.image_size), in_channels=autoencoder.channels,
                 num_classes=flags.num_classes, **{size: value for size, value in given.items() if value is not None})
    return lambda: build_dit(name, **sizes)


def memory(build, flags, chip, images, checkpointed):
    """Bytes of a GPU with activations of this share of the blocks computed twice, and the global batch that fits."""
    step = estimate_step_memory(build, ComputeConfig(flags.precision), checkpointed, flags.grad_accum_steps, flags.fused_adamw)
    usable = int(flags.memory_share * chip.memory)
    at_most = step.at_most(images, flags.gpus, flags.fsdp)
    largest = step.largest_batch(usable, flags.gpus, flags.fsdp) * flags.gpus * flags.grad_accum_steps
    return dict(grad_checkpointing=checkpointed, **step.kept(flags.gpus, flags.fsdp),
                activations=step.activations(images, flags.fsdp), at_most=at_most, usable=usable,
                fits=at_most <= usable, largest_global_batch_size=largest)


def report(found, flags, chip, images):
    """The numbers of one model on a page."""
    each, latents = found["memory"][0], "x".join(map(str, found["latents"]))
    exchange = {"FSDP: whole at a time" if flags.fsdp else "DDP's buckets": each["exchange"]} if flags.gpus > 1 else {}
    kept = dict(weights=each["weights"], gradients=each["gradients"], moments=each["optimizer"], EMA=each["ema"])
    rows = [f"  {checkpointing(row['grad_checkpointing']):24s} {format_bytes(row['activations']):>12s}"
            f"{format_bytes(row['at_most']):>12s}   {'fits' if row['fits'] else 'does not fit':14s}"
            f"{row['largest_global_batch_size']:>13,}" for row in found["memory"]]
    cache, usable = found["latent_cache"], f"of {format_bytes(each['usable'])}"
    return "\n".join([
        f"{found['model']} at {flags.image_size} pixels: latents {latents}, {found['tokens']:,} tokens, "
        f"{found['count_parameters']:,} parameters, {found['gflops']:.2f} Gflops (multiply-adds of an image)",
        "",
        f"Memory of each GPU: {setting(flags, chip, images)}",
        "  " + "   ".join(f"{name} {format_bytes(size)}" for name, size in (kept | exchange).items()),
        f"  {'':24s} {'activations':>12s}{'at most':>12s}   {usable:14s}{'largest batch':>13s}",
        *rows,
        "",
        f"Time: {found['training_step_flops'] / 1e12:,.1f} TFLOP a step, {found['step_seconds']:.3g} s at {rate(flags, chip)}",
        *(f"  {steps:>9,} steps {duration(hours)}" for steps, hours in found["hours"].items()),
        *([] if cache is None else [
            "", f"Latent cache of {flags.images:,} images: {format_bytes(cache)} ({flags.dtype}, "
                f"{'with' if flags.flip else 'without'} mirror images)"])])


def table(plans, flags, chip, images):
    """Lines of all models, each as soon as it is known."""
    yield f"{setting(flags, chip, images)}, {checkpointing(flags.grad_checkpointing)}; time at {rate(flags, chip)}"
    yield (f"{'model':10s}{'count_parameters':>14s}{'Gflops':>9s}{'tokens':>8s}{'activations':>13s}{'at most':>10s}"
           f"{f'of {format_bytes(flags.memory_share * chip.memory)}':>14s}{'largest batch':>15s}{'TFLOP a step':>14s}"
           + "".join(f"{f'{steps:,} steps':>18s}" for steps in flags.steps))
    for found in plans:
        (row,) = found["memory"]
        yield (f"{found['model']:10s}{found['count_parameters']:>14,}{found['gflops']:>9.2f}{found['tokens']:>8,}"
               f"{format_bytes(row['activations']):>13s}{format_bytes(row['at_most']):>10s}"
               f"{'fits' if row['fits'] else 'does not fit':>14s}{row['largest_global_batch_size']:>15,}"
               f"{found['training_step_flops'] / 1e12:>14,.1f}"
               + "".join(f"{f'{hours:,.1f} h':>18s}" for hours in found["hours"].values()))
    if flags.vae != "none":
        yield f"latent cache of {flags.images:,} images: {format_bytes(found['latent_cache'])}"


def setting(flags, chip, images):
    way = f" by {'FSDP' if flags.fsdp else 'DDP'}" if flags.gpus > 1 else ""
    parts = f" in {flags.grad_accum_steps} parts" if flags.grad_accum_steps > 1 else ""
    each = f", {images:,} at once on each" if flags.gpus * flags.grad_accum_steps > 1 else ""
    return f"batch {flags.global_batch_size:,}{parts} on {flags.gpus} x {chip.name}{way}{each}, {flags.precision}"


def rate(flags, chip):
    return f"{flags.mfu:.0%} of {flags.gpus} x {getattr(chip, flags.precision) / 1e12:g} TFLOP/s (--mfu)"


def checkpointing(part):
    return f"--grad-checkpointing {part:g}" if part else "no checkpointing"


def duration(hours):
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 48 else "")


if __name__ == "__main__":
    run_command(main)
