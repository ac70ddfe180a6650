"""Which timesteps a training step looks at."""
import numpy as np
import torch
import torch.distributed as dist


def create_named_schedule_sampler(name, diffusion):
    """A timestep sampler for `diffusion`: "uniform", or "loss-second-moment" (importance sampling)."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise ValueError(f"unknown schedule sampler {name!r}: take one of {', '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler:
    """Draws timesteps with probabilities p_t; weights 1 / (T p_t) keep the expected loss what it was."""

    def weights(self):
        """(T,) float64 array of positive numbers, proportional to p_t."""
        raise NotImplementedError

    def sample(self, batch_size, device, generator=None):
        """Draw a batch of timesteps.

        generator  a torch generator on `device`; the global one if None
        return     timesteps (batch_size,) int64 in [0, T), and the factors of their losses (batch_size,) float32
        """
        weights = self.weights()
        p = torch.tensor(weights / weights.sum(), dtype=torch.float32, device=device)
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    def update_with_local_losses(self, t, losses):
        """Learn from the losses (N,) that this process saw at timesteps t (N,). All processes call it together."""

    def state_dict(self):
        """What a resumed run needs, as tensors."""
        return {}

    def load_state_dict(self, state):
        """Go on from a `state_dict`."""


class UniformSampler(ScheduleSampler):
    """Every timestep alike; drawn on the device, with nothing copied to it."""

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device, generator=None):
        t = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return t, torch.ones(batch_size, device=device)


class LossSecondMomentResampler(ScheduleSampler):
    """p_t proportional to sqrt(E[L_t^2]) over the last losses of each timestep (Improved DDPM, section 3.3).

    history_per_term  how many losses a timestep remembers; until all timesteps have so many, p is uniform
    uniform_prob      share of uniform sampling mixed in, so that no timestep is forgotten

    The history is the same on all processes: each adds the losses of all, in the order of the ranks.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.num_timesteps = diffusion.num_timesteps
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self.losses = np.zeros((self.num_timesteps, history_per_term))  # oldest first
        self.counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self):
        if (self.counts < self.history_per_term).any():
            return np.ones(self.num_timesteps)
        p = np.sqrt((self.losses**2).mean(axis=1))
        p = p / p.sum() if p.sum() > 0 else np.full(self.num_timesteps, 1 / self.num_timesteps)
        return p * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update_with_local_losses(self, t, losses):
        self.update_with_all_losses(*_gather(t, losses))

    def update_with_all_losses(self, t, losses):
        """Add losses to the history; t and losses are sequences of equal length, the same on every process."""
        for i, loss in zip(t, losses):
            if self.counts[i] < self.history_per_term:
                self.losses[i, self.counts[i]] = loss
                self.counts[i] += 1
            else:
                self.losses[i] = np.append(self.losses[i, 1:], loss)

    def state_dict(self):
        return dict(losses=torch.from_numpy(self.losses.copy()), counts=torch.from_numpy(self.counts.copy()))

    def load_state_dict(self, state):
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"the saved loss history has shape {tuple(state['losses'].shape)}, "
                             f"this sampler's is {self.losses.shape}")
        self.losses, self.counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


def _gather(t, losses):
    """Timesteps and losses of all processes as NumPy arrays, in the order of the ranks; batches may differ in size."""
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
