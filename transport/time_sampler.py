"""Distributions of the times that a training step draws."""
import torch

TIME_DISTRIBUTIONS = ("uniform", "logit-normal")


class TimeSampler:
    """Draw training times of a `Transport`, with the interface of `diffusion.timestep_sampler.ScheduleSampler`.

    Args:
        transport (Transport): Gives the interval and the shift of the times.
        distribution (str): "uniform", or "logit-normal": the logistic function of a standard normal number
            (Esser et al., 2024, arXiv 2403.03206).
    """

    learns_from_losses = False

    def __init__(self, transport, distribution="uniform"):
        if distribution not in TIME_DISTRIBUTIONS:
            raise ValueError(f"unknown distribution {distribution!r}: use one of {', '.join(TIME_DISTRIBUTIONS)}")
        self.transport, self.distribution = transport, distribution

    def sample(self, batch_size, device, generator=None):
        """Draw times and the weights of their losses, which are ones: float32, shape (batch_size,) each.

        `generator` is one on `device`, by default the global one.
        """
        draw = torch.rand if self.distribution == "uniform" else torch.randn
        t = draw(batch_size, device=device, generator=generator)
        t = t if self.distribution == "uniform" else t.sigmoid()
        return self.transport.training_times(t), torch.ones(batch_size, device=device)

    def update_with_local_losses(self, t, losses):
        """Learn nothing from losses."""

    def state_dict(self):
        """Return the state to resume from: none."""
        return {}

    def load_state_dict(self, state):
        """Restore a `state_dict`."""
