"""Speed of training steps on random latents: the published recipe, ours, and ours with one flag of speed after another.
"""
import gc
from dataclasses import replace
from types import SimpleNamespace

import torch

from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from models import DiT_models
from runtime.chips import peak
from runtime.costs import multiply_adds, step_flops
from runtime.ema import EMA
from runtime.latents import PixelCodec
from runtime.randomness import BatchRandomness
from runtime.speed import PLAIN, compile_network, fastest
from runtime.training_step import TrainingStep, gradient_norm

from .process import PlainFormulas
from .windows import windows


class PublishedStep:
    """A training step as published code computes it: tables copied to the device at every use, an EMA of one weight
    after the other, and the loss read at every step. Stands here to be measured against.
    """

    def __init__(self, model, device):
        self.model, self.device, self.plain = model, device, PlainFormulas(create_diffusion(""))
        self.ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.running = 0.0

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
        self.running += loss.item()


class OurStep:
    """A training step as train.py computes it, on one process."""

    def __init__(self, model, device, batch, speed=PLAIN, fused=False):
        self.model, self.step, self.losses = model, 0, []
        self.ema = EMA(model, 0.9999)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused or None)
        if speed.compile:
            compile_network(model)
        diffusion = create_diffusion("")
        accelerator = SimpleNamespace(unwrap_model=lambda network: network)
        self.gradients = TrainingStep(accelerator, model, PixelCodec(model.in_channels), diffusion,
                                      create_named_schedule_sampler("uniform", diffusion),
                                      BatchRandomness(0, batch, slice(0, batch), device), parts=1, speed=speed)

    def __call__(self, latents, labels):
        losses = self.gradients.backward(self.step, latents, labels)
        if torch.isfinite(gradient_norm(self.model, None)):  # the one number that a step reads
            self.optimizer.step()
            self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(losses["loss"])
        self.step += 1


def variants(device):
    """(name, speed, fused) one flag after the other, from none to --fast."""
    best = fastest(device)
    rows = [("no flags", PLAIN, False)]
    if best.precision != PLAIN.precision:
        rows.append((f"--precision {best.precision}", replace(PLAIN, precision=best.precision), False))
    rows.append(("+ --compile", best, False))
    return [*rows, ("+ --fused-adamw: --fast", best, True)]


def measure(device, model="DiT-S/4", batch=32, image_size=256, warm_up=3, count=3, calls=4, only=None):
    """Rows of the published recipe and of every variant (or of those in `only`): seconds a step, images a second, MFU,
    memory, and the largest difference of the loss from that without flags over the steps. No memory is a result, too.
    """
    size = image_size // 8
    torch.manual_seed(0)
    latents = torch.randn(batch, 4, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    rows, plain_losses = {}, None
    for name, speed, fused in (("published recipe", None, False), *variants(device)):
        if only and name not in only:
            continue
        torch.manual_seed(0)
        network = DiT_models[model](input_size=size).to(device).train()
        try:
            step = PublishedStep(network, device) if speed is None else OurStep(network, device, batch, speed, fused)
            row = windows(lambda step=step: step(latents, labels), device, warm_up, count, calls)
        except torch.OutOfMemoryError:
            rows[name] = dict(out_of_memory=batch)
            continue
        row |= dict(images_per_second=batch / row["seconds"])
        precision = speed.precision if speed else "tf32"
        if rate := peak(device, precision):
            row["mfu"] = step_flops(multiply_adds(network), batch) / row["seconds"] / rate
        if speed is not None:
            losses = torch.stack(step.losses).cpu()
            plain_losses = losses if plain_losses is None else plain_losses
            row["loss_difference"] = (losses - plain_losses).abs().max().item()
        rows[name] = row
        step.model = step = network = None
        torch._dynamo.reset()
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    first = next(iter(rows.values()))
    for row in rows.values():
        if "seconds" in row and "seconds" in first:
            row["times_as_fast"] = first["seconds"] / row["seconds"]
    return rows


def line(name, row):
    if "out_of_memory" in row:
        return f"{name:26s} out of memory at batch {row['out_of_memory']}"
    text = (f"{name:26s} {row['seconds']:.3f} s a step ({row['lowest']:.3f} to {row['highest']:.3f})   "
            f"{row['images_per_second']:.1f} images/s   {row['times_as_fast']:.2f} times as fast")
    text += f"   MFU {row['mfu']:.1%}" if "mfu" in row else ""
    text += f"   {row['memory_gb']:.1f} GB" if "memory_gb" in row else ""
    return text + (f"   loss differs by {row['loss_difference']:.1e}" if "loss_difference" in row else "")
