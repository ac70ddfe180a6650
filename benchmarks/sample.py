"""Speed of guided sampling: as published code computes it, ours, and ours with one flag of speed after another."""
import functools

import torch

from models import DiT_models
from runtime.generate import SampleNoise, image_maker
from runtime.latents import PixelCodec
from runtime.speed import PLAIN

from .process import PlainFormulas
from .train import line as train_line
from .train import variants
from .windows import compare


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


def measure(device, model="DiT-S/4", batch=8, image_size=256, steps=10, warm_up=2, count=5, calls=1):
    """Seconds a batch of so many images and steps, guided: as published, then with every variant; and the largest
    difference of the samples (latents) from those without flags.
    """
    size = image_size // 8
    labels = torch.arange(batch, device=device)
    chosen = {name: speed for name, speed, _ in variants(device, training=False)}
    samples = {}

    def maker(name):
        def make():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).eval()
            for weight in network.parameters():  # nothing that is zero at the start may hide a difference
                torch.nn.init.normal_(weight, std=0.02)
            images = image_maker(network, PixelCodec(4), steps, cfg_scale=4.0, speed=chosen.get(name, PLAIN))
            run = functools.partial(images if name in chosen else functools.partial(published_sampling, images), labels)
            samples[name] = run(noise_of(labels)).cpu()
            return lambda: run(noise_of(labels))
        return make

    rows = compare({name: maker(name) for name in ("published loop", *chosen)}, device, warm_up, count, calls)
    plain = samples.get("no flags")
    for name, row in rows.items():
        if "seconds" in row:
            row["images_per_second"] = batch / row["seconds"]
            if plain is not None:
                row["difference"] = ((samples[name] - plain).abs().max() / plain.abs().max()).item()
    return rows


def noise_of(labels):
    return SampleNoise(0, range(len(labels)), labels.device)


def line(name, row):
    difference = f"   samples differ by {row['difference']:.1e} of the largest" if "difference" in row else ""
    return train_line(name, row).replace(" a step ", " a batch ") + difference
