"""One training step."""
import math
from dataclasses import dataclass

import torch

from common.compute import DEFAULT_COMPUTE, ComputeConfig
from common.seeding import LABEL_DROP, NOISE, POSTERIOR, BatchRNG
from diffusion.timestep_sampler import UniformSampler
from training.ema import EMA
from training.fsdp import grad_sync, is_sharded, total_grad_norm
from training.nan_guard import NonFiniteGuard


@dataclass
class TrainingStep:
    """The gradients of a training step: encode, add noise, predict it, compare (algorithm 1 of DDPM).

    Every random number comes from `random`, so that it follows from (seed, step, position in the global batch).
    parts  the rows are computed in so many parts, to save memory
    speed  how the network is computed
    """

    network: torch.nn.Module
    autoencoder: object
    diffusion: object
    schedule_sampler: object
    random: BatchRNG
    parts: int
    compute: ComputeConfig = DEFAULT_COMPUTE

    def backward(self, step, images, labels):
        """Add the gradients over this process' rows of the global batch.

        images  (n, C, H, W) in [-1, 1], or what else the codec takes; labels (n,)
        return  dictionary of scalars on the device: loss, mse, vb, weighted means over the rows
        """
        model, network = getattr(self.network, "module", self.network), self.compute.wrap(self.network)
        latent_shape = (model.in_channels, *model.x_embedder.input_size)
        t, weights = self.random.timesteps(step, self.schedule_sampler)
        noise = self.random.normal(NOISE, step, latent_shape)
        posterior_noise = self.random.normal(POSTERIOR, step, latent_shape) if self.autoencoder.is_random else noise
        drop = self.random.uniform(LABEL_DROP, step) < model.y_embedder.dropout_prob
        has_null_class = model.y_embedder.has_null_class

        all_terms = []
        share = len(labels) // self.parts
        for part in range(self.parts):
            rows, is_last = slice(part * share, (part + 1) * share), part == self.parts - 1
            condition = dict(y=labels[rows], force_drop_ids=drop[rows] if has_null_class else None)
            x = self.autoencoder.encode(images[rows], posterior_noise[rows])
            with grad_sync(self.network, is_last), self.compute.attention_kernel():
                terms = self.diffusion.training_losses(network, x, t[rows], condition, noise[rows])
                nan_if_not_finite((terms["loss"] * weights[rows]).mean() / self.parts).backward()
            all_terms.append({name: values.detach() for name, values in terms.items()})
        terms = {name: torch.cat([terms[name] for terms in all_terms]) for name in all_terms[0]}
        self.timesteps, self.sample_losses = t, terms["loss"]
        return {name: (values * weights).mean() for name, values in terms.items()}

    def learn(self):
        """Tell the timestep sampler the losses of the last step, once it has been applied."""
        self.schedule_sampler.update_with_local_losses(self.timesteps, self.sample_losses)


def nan_if_not_finite(loss):
    """The loss, whose gradient is NaN where the loss is not finite: so all processes hear of it by their gradients."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def clip_grad_norm(model, max_norm):
    """The gradient's norm (a scalar on the device), after which it is clipped to max_norm, if any."""
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = total_grad_norm(grads)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


@dataclass
class Update:
    """Applies a step's gradients to weights, moments and average, unless something is wrong with them.

    Where the device can decide, it does: then nothing that a step computes is read before the next one has been
    launched, and the guard hears of a bad step a step late. It can where the only question is whether the gradient is
    finite and the optimiser is fused, whose kernel then leaves all as it is.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    guard: NonFiniteGuard
    step: TrainingStep

    def __post_init__(self):
        kind = next(self.model.parameters()).device.type
        self.device_decides = bool(kind in ("cpu", "cuda") and self.optimizer.defaults["fused"]
                                   and self.guard.max_spike is None
                                   and isinstance(self.step.schedule_sampler, UniformSampler)
                                   and not is_sharded(self.model))

    def __call__(self, step, losses, grad_norm, items, monitor):
        """Apply step number `step`; what it is told is as for `StepGuard.allows`. `monitor` counts it."""
        if self.device_decides:
            is_finite = torch.isfinite(grad_norm)
            self.optimizer.found_inf = 1 - is_finite.float()
            self._apply(is_finite.float())
            self.guard.note(step, is_finite, self.step.sample_losses, items)
            monitor.add(losses, is_finite)
        elif self.guard.allows(step, losses["loss"], grad_norm, self.step.sample_losses, items):
            self._apply(None)
            monitor.add(losses)
        else:
            monitor.skip()
        self.optimizer.zero_grad(set_to_none=True)

    def _apply(self, weight):
        self.optimizer.step()
        self.ema.update(self.model, weight)
        self.step.learn()
