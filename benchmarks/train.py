"""Speed of training steps on random latents: the published recipe, train.py without flags, train.py --fast.

On a GPU: python -m benchmarks.train --ablation --model DiT-XL/2 --batch 256 --warm-up 10 --calls 10
"""
from dataclasses import replace

import torch

from autoencoder.vae import IdentityAutoencoder
from benchmarks.diffusion_overhead import PlainFormulas
from benchmarks.timing import compare, format_speed, run_benchmark
from common.compute import DEFAULT_COMPUTE, fastest_config
from common.flops import count_multiply_adds, peak_flops, training_step_flops
from common.seeding import BatchRNG
from diffusion import create_diffusion
from diffusion.timestep_sampler import UniformSampler
from models import DiT_models
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainStep


class PublishedStep:
    """A training step as published code computes it, as a baseline.

    Tables are copied to the device at every use, the EMA is one weight after the other, every loss is read.
    """

    def __init__(self, model, device):
        self.model, self.device, self.plain = model, device, PlainFormulas(create_diffusion(""))
        self.ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.losses = []

    def __call__(self, latents, labels):
        """Train on a batch of latents, shape (N, 4, H, W)."""
        t, noise = torch.randint(0, 1000, (len(latents),), device=self.device), torch.randn_like(latents)
        output = self.model(self.plain.q_sample(latents, t, noise), self.plain.model_timesteps(t), labels)
        loss = self.plain.losses(output, latents, t, noise).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                self.ema[name].mul_(0.9999).add_(weight.data, alpha=0.0001)
        self.losses.append(loss.item())


class OurStep:
    """A training step of train.py on one rank; losses stay on the device, as with `MetricLogger`."""

    def __init__(self, model, device, batch, compute=DEFAULT_COMPUTE, fused=False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused or None)
        ema = EMA(model, 0.9999)
        compute.prepare(model)
        diffusion = create_diffusion("")
        self.train_step = TrainStep(
            model, model, IdentityAutoencoder(model.in_channels), diffusion, UniformSampler(diffusion), optimizer,
            [ema], NonFiniteGuard(max_bad_steps=10), BatchRNG(0, batch, slice(0, batch), device), compute=compute)
        self.losses = []

    def __call__(self, latents, labels):
        """Train on a batch of latents, shape (N, 4, H, W)."""
        losses, _, _ = self.train_step(len(self.losses), latents, dict(y=labels))
        self.losses.append(losses["loss"])


def speed_settings(device, fused_adamw=True):
    """Return {row: (ComputeConfig, fused AdamW)}: one speed flag after the other, from none to --fast."""
    fastest, compute = fastest_config(device), DEFAULT_COMPUTE
    rows = [("no flags", compute, False)]
    for name in ("precision", "compile", "attention"):
        value = getattr(fastest, name)
        if value != getattr(DEFAULT_COMPUTE, name):
            compute = replace(compute, **{name: value})
            rows.append((f"+ --{name}" + (f" {value}" if value is not True else ""), compute, False))
    if fused_adamw:
        rows.append(("+ --fused-adamw", fastest, True))
    name, *last = rows[-1]
    rows[-1] = (f"{name}: --fast", *last)
    if torch.device(device).type == "cuda":
        rows += [(f"--fast {flag}", replace(fastest, **change), fused_adamw) for flag, change in (
            ("--attention flash", dict(attention="flash")), ("--attention cudnn", dict(attention="cudnn")),
            ("--cuda-graphs", dict(cuda_graphs=True)))]
    return {name: (compute, fused) for name, compute, fused in rows}


def measure(device, model="DiT-S/4", batch=32, image_size=256, warm_up=3, count=5, calls=3, ablation=False):
    """Return seconds a step, images a second, MFU, memory, and the largest difference of the loss from no flags."""
    size = image_size // 8
    torch.manual_seed(0)
    latents = torch.randn(batch, 4, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    settings = {name: setting for name, setting in speed_settings(device).items()
                if ablation or name == "no flags" or name.endswith(": --fast")}
    losses = {}

    def builder(name):
        def build():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).train()
            step = (OurStep(network, device, batch, *settings[name]) if name in settings
                    else PublishedStep(network, device))
            losses[name] = step.losses
            return lambda: step(latents, labels)
        return build

    rows = compare({name: builder(name) for name in ("published recipe", *settings)}, device, warm_up, count, calls)
    with torch.device("meta"):
        flops = training_step_flops(count_multiply_adds(DiT_models[model](input_size=size)), batch)
    for name, row in rows.items():
        if "seconds" not in row:
            continue
        row["images_per_second"] = batch / row["seconds"]
        if peak := peak_flops(device, settings[name][0].precision if name in settings else "tf32"):
            row["mfu"] = flops / row["seconds"] / peak
        if name in settings and "seconds" in rows["no flags"]:
            pairs = zip(losses[name], losses["no flags"])
            row |= dict(loss_difference=max(abs(loss - plain).item() for loss, plain in pairs), steps=len(losses[name]))
    return rows


def format_row(name, row):
    """Return the line of a row."""
    text = format_speed(name, row, "step")
    if "loss_difference" in row:
        text += f"   loss differs by {row['loss_difference']:.1e} in {row['steps']} steps"
    return text


def main():
    """Run the benchmark from the command line."""
    run_benchmark("train", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
