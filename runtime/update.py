"""What follows the gradients: the optimiser's step and the moving average's, or neither."""
from dataclasses import dataclass

import torch

from diffusion.timestep_sampler import UniformSampler

from . import sharding
from .ema import EMA
from .step_guard import StepGuard
from .training_step import TrainingStep


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
    guard: StepGuard
    step: TrainingStep

    def __post_init__(self):
        kind = next(self.model.parameters()).device.type
        self.device_decides = bool(kind in ("cpu", "cuda") and self.optimizer.defaults["fused"]
                                   and self.guard.max_spike is None
                                   and isinstance(self.step.schedule_sampler, UniformSampler)
                                   and not sharding.is_sharded(self.model))

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
