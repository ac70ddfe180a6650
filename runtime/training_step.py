"""The gradients of a training step."""
import math
from dataclasses import dataclass

import torch

from . import sharding
from .randomness import LABEL_DROP, NOISE, POSTERIOR, BatchRandomness
from .speed import PLAIN, Speed


@dataclass
class TrainingStep:
    """The gradients of a training step: encode, add noise, predict it, compare (algorithm 1 of DDPM).

    Every random number comes from `random`, so that it follows from (seed, step, position in the global batch).
    parts  the rows are computed in so many parts, to save memory
    speed  how the network is computed
    """

    accelerator: object
    network: torch.nn.Module
    codec: object
    diffusion: object
    schedule_sampler: object
    random: BatchRandomness
    parts: int
    speed: Speed = PLAIN

    def backward(self, step, images, labels):
        """Add the gradients over this process' rows of the global batch.

        images  (n, C, H, W) in [-1, 1], or what else the codec takes; labels (n,)
        return  dictionary of scalars on the device: loss, mse, vb, weighted means over the rows
        """
        model, network = self.accelerator.unwrap_model(self.network), self.speed.of(self.network)
        latent_shape = (model.in_channels, *model.x_embedder.input_size)
        t, weights = self.random.timesteps(step, self.schedule_sampler)
        noise = self.random.normal(NOISE, step, latent_shape)
        posterior_noise = self.random.normal(POSTERIOR, step, latent_shape) if self.codec.is_random else noise
        drop = self.random.uniform(LABEL_DROP, step) < model.y_embedder.dropout_prob
        has_null_class = model.y_embedder.has_null_class

        all_terms = []
        share = len(labels) // self.parts
        for part in range(self.parts):
            rows, is_last = slice(part * share, (part + 1) * share), part == self.parts - 1
            condition = dict(y=labels[rows], force_drop_ids=drop[rows] if has_null_class else None)
            x = self.codec.encode(images[rows], posterior_noise[rows])
            with sharding.gradients_of(self.accelerator, self.network, is_last), self.speed.kernels():
                terms = self.diffusion.training_losses(network, x, t[rows], condition, noise[rows])
                spoil_if_not_finite((terms["loss"] * weights[rows]).mean() / self.parts).backward()
            all_terms.append({name: values.detach() for name, values in terms.items()})
        terms = {name: torch.cat([terms[name] for terms in all_terms]) for name in all_terms[0]}
        self.timesteps, self.sample_losses = t, terms["loss"]
        return {name: (values * weights).mean() for name, values in terms.items()}

    def learn(self):
        """Tell the timestep sampler the losses of the last step, once it has been applied."""
        self.schedule_sampler.update_with_local_losses(self.timesteps, self.sample_losses)


def spoil_if_not_finite(loss):
    """The loss, whose gradient is NaN where the loss is not finite: so all processes hear of it by their gradients."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def gradient_norm(model, max_norm):
    """The gradient's norm (a scalar on the device), after which it is clipped to max_norm, if any."""
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = sharding.total_norm(grads)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
