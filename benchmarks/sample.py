"""Speed of guided sampling: the published loop, then sample_ddp.py with one speed flag after another.

On a GPU: python -m benchmarks.sample --model DiT-XL/2 --batch 32 --steps 250 --calls 1
"""
import functools

import torch

from autoencoder.vae import IdentityAutoencoder
from benchmarks.diffusion_overhead import PlainFormulas
from benchmarks.timing import compare, format_speed, run_benchmark
from benchmarks.train import speed_settings
from common.compute import DEFAULT_COMPUTE
from models import DiT_models
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline


@torch.no_grad()
def published_loop(pipeline, cond, noise):
    """Sample as published code does: the doubled batch throughout, tables copied to the device at every use."""
    model, plain, n = pipeline.model, PlainFormulas(pipeline.diffusion), len(cond["y"])
    labels = torch.cat([cond["y"], model.null_condition(cond)["y"]])
    x = noise.initial((n, *model.sample_shape)).repeat(2, 1, 1, 1)
    for i in reversed(range(pipeline.diffusion.num_timesteps)):
        t = torch.tensor([i] * len(x), device=x.device)
        output = model.forward_with_cfg(x, plain.model_timesteps(t), labels, pipeline.cfg_scale)
        x = plain.sample_step(output, x, t)
    return x[:n]


def measure(device, model="DiT-S/4", batch=32, image_size=256, steps=5, warm_up=1, count=5, calls=1):
    """Return seconds a batch, and the largest difference of the latents from those without flags."""
    size = image_size // 8
    cond = dict(y=torch.arange(batch, device=device))
    settings = {name: compute for name, (compute, _) in speed_settings(device, fused_adamw=False).items()}
    samples = {}

    def builder(name):
        def build():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).eval()
            for weight in network.parameters():  # zeros at the start would hide differences
                torch.nn.init.normal_(weight, std=0.02)
            pipeline = build_pipeline(network, IdentityAutoencoder(4), steps, cfg_scale=4.0,
                                      compute=settings.get(name, DEFAULT_COMPUTE))
            sample = pipeline if name in settings else functools.partial(published_loop, pipeline)
            samples[name] = sample(cond, PerSampleRNG(0, range(batch), device)).cpu()
            return lambda: sample(cond, PerSampleRNG(0, range(batch), device))
        return build

    rows = compare({name: builder(name) for name in ("published loop", *settings)}, device, warm_up, count, calls)
    plain = samples.get("no flags")
    for name, row in rows.items():
        if "seconds" in row:
            row["images_per_second"] = batch / row["seconds"]
            if plain is not None and name in settings:
                row["difference"] = ((samples[name] - plain).abs().max() / plain.abs().max()).item()
    return rows


def format_row(name, row):
    """Return the line of a row."""
    difference = f"   samples differ by {row['difference']:.1e} of the largest" if "difference" in row else ""
    return format_speed(name, row, "batch") + difference


def main():
    """Run the benchmark from the command line."""
    run_benchmark("sample", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
