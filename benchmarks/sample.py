"""Speed of guided sampling: as published code computes it, ours, and ours with one flag of speed after another."""

import functools

import torch

from autoencoder.vae import IdentityAutoencoder
from benchmarks.diffusion_overhead import PlainFormulas
from benchmarks.timing import compare
from benchmarks.train import variants
from common.compute import DEFAULT_COMPUTE
from models import DiT_models
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline


@torch.no_grad()
def published_sampling(make, labels, noise):
    """The loop of published code: the doubled batch all the way, tables copied to the device at every use."""
    model, plain, rows = make.model, PlainFormulas(make.diffusion), len(labels)
    null = torch.full_like(labels, model.y_embedder.num_classes)
    x = noise.initial((rows, model.in_channels, *model.x_embedder.input_size)).repeat(2, 1, 1, 1)
    for i in reversed(range(make.diffusion.num_timesteps)):
        t = torch.tensor([i] * len(x), device=x.device)
        output = model.forward_with_cfg(x, plain.model_timesteps(t), torch.cat([labels, null]), make.cfg_scale)
        x = plain.sample_step(output, x, t)
    return x[:rows]


def measure(device, model="DiT-S/4", batch=32, image_size=256, steps=5, warm_up=1, count=5, calls=1):
    """Seconds a batch of so many images and steps, guided: as published, then with every variant; and the largest
    difference of the samples (latents) from those without flags.
    """
    size = image_size // 8
    labels = torch.arange(batch, device=device)
    chosen = {name: compute for name, compute, _ in variants(device, training=False)}
    samples = {}

    def maker(name):
        def make():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).eval()
            for weight in network.parameters():  # nothing that is zero at the start may hide a difference
                torch.nn.init.normal_(weight, std=0.02)
            images = build_pipeline(network, IdentityAutoencoder(4), steps, cfg_scale=4.0, compute=chosen.get(name, DEFAULT_COMPUTE))
            run = functools.partial(images if name in chosen else functools.partial(published_sampling, images), labels)
            samples[name] = run(noise_of(labels)).cpu()
            return lambda: run(noise_of(labels))
        return make

    rows = compare({name: maker(name) for name in ("published loop", *chosen)}, device, warm_up, count, calls)
    plain = samples.get("no flags")
    for name, row in rows.items():
        if "seconds" in row:
            row["images_per_second"] = batch / row["seconds"]
            if plain is not None and name in chosen:
                row["difference"] = ((samples[name] - plain).abs().max() / plain.abs().max()).item()
    return rows


def noise_of(labels):
    return PerSampleRNG(0, range(len(labels)), labels.device)


def line(name, row):
    difference = f"   samples differ by {row['difference']:.1e} of the largest" if "difference" in row else ""
    return line(name, row).replace(" a step ", " a batch ") + difference
