"""Speed of training steps on random latents: the published recipe, ours without flags, and ours with --fast.
"""

from dataclasses import replace

import torch

from autoencoder.vae import IdentityAutoencoder
from benchmarks.diffusion_overhead import PlainFormulas
from benchmarks.timing import compare
from common.compute import DEFAULT_COMPUTE, fastest_config
from common.flops import count_multiply_adds, peak_flops, training_step_flops
from common.seeding import BatchRNG
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from models import DiT_models
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainingStep, Update, clip_grad_norm


class PublishedStep:
    """A training step as published code computes it: tables copied to the device at every use, an EMA of one weight
    after the other, and the loss read at every step. Stands here to be measured against.
    """

    def __init__(self, model, device):
        self.model, self.device, self.plain = model, device, PlainFormulas(create_diffusion(""))
        self.ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.losses = []

    def __call__(self, latents, labels):
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
    """A training step as train.py computes it, on one process."""

    def __init__(self, model, device, batch, compute=DEFAULT_COMPUTE, fused=False):
        self.model, self.step, self.losses = model, 0, []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused or None)
        ema = EMA(model, 0.9999)
        compute.prepare(model)
        diffusion = create_diffusion("")
        self.gradients = TrainingStep(model, IdentityAutoencoder(model.in_channels), diffusion,
                                      create_named_schedule_sampler("uniform", diffusion),
                                      BatchRNG(0, batch, slice(0, batch), device), parts=1, compute=compute)
        self.update = Update(model, optimizer, ema, NonFiniteGuard(max_bad_steps=10), self.gradients)

    def __call__(self, latents, labels):
        losses = self.gradients.backward(self.step, latents, labels)
        self.update(self.step, losses, clip_grad_norm(self.model, None), lambda step: [range(len(labels))], self)
        self.step += 1

    def add(self, losses, applied=True):
        """What a `MetricLogger` does with a step: keep its loss on the device."""
        self.losses.append(losses["loss"])


def variants(device, training=True):
    """(name, speed, fused) one flag after the other, from none to --fast."""
    best, compute = fastest_config(device), DEFAULT_COMPUTE
    rows = [("no flags", compute, False)]
    for flag, change in (("--precision", "precision"), ("--compile", "compile"), ("--attention", "attention")):
        if (value := getattr(best, change)) != getattr(DEFAULT_COMPUTE, change):
            compute = replace(compute, **{change: value})
            rows.append((f"+ {flag}" + (f" {value}" if value is not True else ""), compute, False))
    if training:
        rows.append(("+ --fused-adamw", best, True))
    name, *last = rows[-1]
    rows[-1] = (f"{name}: --fast", *last)
    if torch.device(device).type == "cuda":
        rows += [(f"--fast {flag}", replace(best, **change), training) for flag, change in (
            ("--attention flash", dict(attention="flash")), ("--attention cudnn", dict(attention="cudnn")),
            ("--cuda-graphs", dict(cuda_graphs=True)))]
    return rows


def measure(device, model="DiT-S/4", batch=32, image_size=256, warm_up=3, count=5, calls=3, each=False):
    """Rows of the published recipe, of no flags and of --fast (each: and of every flag between them): seconds a step,
    images a second, MFU, memory, and the largest difference of the loss from that without flags over the steps.
    """
    size = image_size // 8
    torch.manual_seed(0)
    latents = torch.randn(batch, 4, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    chosen = {name: (compute, fused) for name, compute, fused in variants(device)
              if each or compute == DEFAULT_COMPUTE or name.endswith(": --fast")}
    steps = {}

    def maker(name):
        def make():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).train()
            step = (OurStep(network, device, batch, *chosen[name]) if name in chosen
                    else PublishedStep(network, device))
            steps[name] = step.losses
            return lambda: step(latents, labels)
        return make

    rows = compare({name: maker(name) for name in ("published recipe", *chosen)}, device, warm_up, count, calls)
    with torch.device("meta"):
        cost = training_step_flops(count_multiply_adds(DiT_models[model](input_size=size)), batch)
    for name, row in rows.items():
        if "seconds" not in row:
            continue
        row["images_per_second"] = batch / row["seconds"]
        if rate := peak_flops(device, chosen[name][0].precision if name in chosen else "tf32"):
            row["mfu"] = cost / row["seconds"] / rate
        if name in chosen and "seconds" in rows["no flags"]:
            pairs = zip(steps[name], steps["no flags"])
            row |= dict(loss_difference=max(abs(own - plain).item() for own, plain in pairs), steps=len(steps[name]))
    return rows


def line(name, row):
    if "seconds" not in row:
        return f"{name:26s} out of memory"
    text = (f"{name:26s} {row['seconds']:.3f} s a step ({row['lowest']:.3f} to {row['highest']:.3f})   "
            f"{row['images_per_second']:.1f} images/s")
    text += f"   {row['times_as_fast']:.2f} times as fast" if "times_as_fast" in row else ""
    text += f"   MFU {row['mfu']:.1%}" if "mfu" in row else ""
    text += f"   {row['memory_gb']:.1f} GB" if "memory_gb" in row else ""
    return text + (f"   loss differs by {row['loss_difference']:.1e} in {row['steps']} steps"
                   if "loss_difference" in row else "")
