"""Timestep samplers: the timesteps that a training step draws, and the weights of their losses."""
import numpy as np
import torch
import torch.distributed as dist


def create_named_schedule_sampler(name, diffusion):
    """Create the timestep sampler "uniform" or "loss-second-moment" (importance sampling) for a diffusion process."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise ValueError(f"unknown schedule sampler {name!r}: use one of {', '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler:
    """Draw timesteps with probabilities p_t; weights 1 / (T p_t) keep the expected loss unchanged."""

    learns_from_losses = False  # whether `update_with_local_losses` does anything

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        """Return positive numbers proportional to p_t, float64, shape (T,)."""
        raise NotImplementedError

    def sample(self, batch_size, device, generator=None):
        """Draw timesteps in [0, T), int64, and the weights of their losses, float32, shape (batch_size,) each.

        `generator` is one on `device`, by default the global one.
        """
        weights = self.weights()
        p = torch.tensor(weights / weights.sum(), dtype=torch.float32, device=device)
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    def update_with_local_losses(self, t, losses):
        """Learn from the losses (n,) of this rank at timesteps t (n,). Collective: all ranks must call it."""

    def state_dict(self):
        """Return the state to resume from, as tensors."""
        return {}

    def load_state_dict(self, state):
        """Restore a `state_dict`."""


class UniformSampler(ScheduleSampler):
    """Draw all timesteps equally often, on the device."""

    def weights(self):
        """Return ones, shape (T,)."""
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device, generator=None):
        """Draw a batch of timesteps, with weights of one; see `ScheduleSampler.sample`."""
        t = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return t, torch.ones(batch_size, device=device)


class LossSecondMomentResampler(ScheduleSampler):
    """Draw timesteps with p_t proportional to sqrt(E[L_t^2]) of their last losses (Improved DDPM, section 3.3).

    All ranks hold the same history: each adds the losses of all ranks, in their order.

    Args:
        diffusion (GaussianDiffusion): The process, of T steps.
        history_per_term (int): Number of losses kept per timestep; until all timesteps have as many, p is uniform.
        uniform_prob (float): Share of uniform sampling mixed in, so that every timestep is drawn.
    """

    learns_from_losses = True

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        super().__init__(diffusion)
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self.losses = np.zeros((self.num_timesteps, history_per_term))  # oldest first
        self.counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self):
        """Return p_t, shape (T,), or ones until the history is complete."""
        if (self.counts < self.history_per_term).any():
            return np.ones(self.num_timesteps)
        p = np.sqrt((self.losses**2).mean(axis=1))
        p = p / p.sum() if p.sum() > 0 else np.full(self.num_timesteps, 1 / self.num_timesteps)
        return p * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update_with_local_losses(self, t, losses):
        """Add the losses (n,) of all ranks at their timesteps t (n,) to the history."""
        for i, loss in zip(*_all_gather(t, losses)):
            if self.counts[i] < self.history_per_term:
                self.losses[i, self.counts[i]] = loss
                self.counts[i] += 1
            else:
                self.losses[i] = np.append(self.losses[i, 1:], loss)

    def state_dict(self):
        """Return the history as tensors, a copy."""
        return dict(losses=torch.from_numpy(self.losses.copy()), counts=torch.from_numpy(self.counts.copy()))

    def load_state_dict(self, state):
        """Restore the history of a sampler of the same sizes."""
        losses, counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()
        if losses.shape != self.losses.shape or counts.shape != self.counts.shape:
            raise ValueError(f"the saved loss history has shape {losses.shape}, this sampler's is {self.losses.shape}")
        if counts.dtype != self.counts.dtype or counts.min() < 0 or not np.isfinite(losses).all():
            raise ValueError("the saved loss history is damaged")
        self.losses, self.counts = losses, counts


def _all_gather(t, losses):
    """Gather timesteps and losses of all ranks as arrays, in their order; ranks may have batches of unequal size."""
    pairs = torch.stack([t.float(), losses.detach().float()])  # T is far below 2^24: exact
    if not (dist.is_available() and dist.is_initialized()):
        t, losses = pairs.cpu().numpy()
        return t.astype(np.int64), losses
    size = torch.tensor([pairs.shape[1]], device=pairs.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(pairs, (0, longest - pairs.shape[1]))
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    t, losses = torch.cat([rows[:, : int(size)] for rows, size in zip(gathered, sizes)], dim=1).cpu().numpy()
    return t.astype(np.int64), losses
