"""One training step of a DiT, top to bottom (DDPM, algorithm 1; Improved DDPM, section 3.1; or flow matching)."""
import math
from dataclasses import dataclass

import torch
from torch import nn

from autoencoder.vae import VAE, CachedLatents, IdentityAutoencoder
from common.compute import DEFAULT_COMPUTE, ComputeConfig
from common.seeding import LABEL_DROP, NOISE, POSTERIOR, BatchRNG
from diffusion import GaussianDiffusion
from diffusion.timestep_sampler import ScheduleSampler
from training.ema import EMA
from training.fsdp import grad_sync, is_sharded, total_grad_norm
from training.nan_guard import NonFiniteGuard
from transport import TimeSampler, Transport


@dataclass
class TrainStep:
    """Compute the gradients of a batch and apply them, unless they are non-finite.

    Every random number comes from `rng`, a function of (seed, step, position in the global batch): the number of ranks
    and microbatches does not change what is computed.
    """

    model: nn.Module           # the DiT with its weights; sharded with FSDP
    network: nn.Module         # what computes it: the model itself, or the model in DDP
    autoencoder: VAE | IdentityAutoencoder | CachedLatents
    objective: GaussianDiffusion | Transport
    schedule_sampler: ScheduleSampler | TimeSampler
    optimizer: torch.optim.Optimizer
    emas: list[EMA]
    guard: NonFiniteGuard      # decides whether a step is applied
    rng: BatchRNG              # random numbers of this rank's rows of the global batch
    num_microbatches: int = 1  # parts of the local batch, computed one after the other to save memory
    max_grad_norm: float | None = None
    compute: ComputeConfig = DEFAULT_COMPUTE

    def __post_init__(self):
        self.decides_on_device = can_decide_on_device(self.model, self.optimizer, self.guard, self.schedule_sampler)

    def __call__(self, step, images, cond):
        """Train on the local rows of a global batch.

        Args:
            step (int): Number of steps before this one.
            images (Tensor): Images in [-1, 1], shape (N, C, H, W), or cached moments of latents, (N, 2C, h, w).
            cond (dict): Condition of each image, tensors of shape (N, ...): {"y": labels}.

        Returns:
            tuple: Weighted mean losses of the local rows (dict of scalars: loss, mse, vb), the norm of the gradient
            (scalar), and whether the step was applied (bool, or a scalar on the device).
        """
        model, network = self.model, self.compute.wrap(self.network)
        t, weights = self.rng.timesteps(step, self.schedule_sampler)                                # (N,), (N,)
        noise = self.rng.normal(NOISE, step, model.sample_shape)                                    # (N, C, h, w)
        posterior_noise = self.rng.normal(POSTERIOR, step, model.sample_shape) if self.autoencoder.is_random else noise
        if model.has_null_condition:
            cond = cond | dict(force_drop_ids=self.rng.uniform(LABEL_DROP, step) < model.config.class_dropout_prob)

        microbatch_terms = []
        size = len(images) // self.num_microbatches
        for start in range(0, len(images), size):
            rows, is_last = slice(start, start + size), start + size == len(images)
            x_start = self.autoencoder.encode(images[rows], posterior_noise[rows])                  # (n, C, h, w)
            model_kwargs = {name: value[rows] for name, value in cond.items()}
            with grad_sync(self.network, is_last), self.compute.attention_kernel():
                terms = self.objective.training_losses(network, x_start, t=t[rows], model_kwargs=model_kwargs,
                                                       noise=noise[rows])
                loss = (terms["loss"] * weights[rows]).mean() / self.num_microbatches
                nan_if_non_finite(loss).backward()
            # A term is a number for each sample; flow matching returns its prediction too.
            microbatch_terms.append({name: value.detach() for name, value in terms.items() if value.ndim == 1})
        terms = {name: torch.cat([part[name] for part in microbatch_terms]) for name in microbatch_terms[0]}
        losses = {name: (value * weights).mean() for name, value in terms.items()}

        grad_norm = clip_grad_norm(model, self.max_grad_norm)
        is_applied = self.apply(step, losses["loss"], grad_norm, terms["loss"])
        if is_applied is not False:  # on the device the optimizer itself skips a bad step
            self.schedule_sampler.update_with_local_losses(t, terms["loss"])
        return losses, grad_norm, is_applied

    def apply(self, step, loss, grad_norm, sample_losses):
        """Update weights, optimizer and averages, unless the step is bad; return whether it was applied.

        If the device can decide, nothing is read from it: the fused optimizer skips a non-finite gradient by itself,
        and the guard learns of it one step later.
        """
        if self.decides_on_device:
            is_applied = torch.isfinite(grad_norm)
            self.optimizer.found_inf = 1 - is_applied.float()
        else:
            is_applied = self.guard.check(step, loss, grad_norm, sample_losses)
        if is_applied is not False:
            self.optimizer.step()
            for ema in self.emas:
                ema.update(self.model, is_applied.float() if self.decides_on_device else None, step)
        if self.decides_on_device:
            self.guard.check_later(step, is_applied, sample_losses)
        self.optimizer.zero_grad()
        return is_applied


def can_decide_on_device(model, optimizer, guard, schedule_sampler):
    """Return whether the device alone can decide on a step: only a non-finite gradient is bad, and AdamW is fused."""
    return bool(model.device.type in ("cpu", "cuda") and optimizer.defaults["fused"] and guard.max_loss_spike is None
                and not schedule_sampler.learns_from_losses and not is_sharded(model))


def nan_if_non_finite(loss):
    """Make the gradient of a non-finite loss NaN, so that all ranks learn of it through their averaged gradients."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def clip_grad_norm(model, max_norm=None):
    """Clip the gradient to `max_norm`, if given; return its norm before that, a scalar on the device."""
    norm = total_grad_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
