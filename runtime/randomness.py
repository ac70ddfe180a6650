"""Random numbers as a function of what they are for: (seed, stream, step or epoch or sample).

Nothing of a generator's state is ever saved: a resumed run, or one on another number of processes, draws the same.
"""
import numpy as np
import torch

# One number for each use, so that two uses never share a sequence. Changing one changes every trajectory.
WEIGHTS, DATA_ORDER, FLIP, TIMESTEP, NOISE, LABEL_DROP, POSTERIOR, SAMPLE_LABEL, SAMPLE_NOISE = range(9)


def seed_of(*key):
    """Mix non-negative integers to one 63-bit seed (NumPy's SeedSequence: near keys give unrelated seeds)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key, device="cpu"):
    """A torch generator on `device` that starts at the sequence of `key`."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class BatchRandomness:
    """Random numbers of a training step, a function of (seed, step, position in the global batch).

    Every process draws for the whole global batch, on its device, and takes its own rows: for latents this costs
    microseconds, needs no communication, and does not depend on the number of processes.

    rows  the slice of the global batch that this process computes
    """

    def __init__(self, seed, global_batch_size, rows, device):
        self.seed, self.global_batch_size, self.rows = seed, global_batch_size, rows
        self.generator = torch.Generator(device)

    def _at(self, stream, step):
        return self.generator.manual_seed(seed_of(self.seed, stream, step))

    def normal(self, stream, step, shape):
        """(rows, *shape) standard normal."""
        generator = self._at(stream, step)
        return torch.randn(self.global_batch_size, *shape, generator=generator, device=generator.device)[self.rows]

    def uniform(self, stream, step):
        """(rows,) uniform in [0, 1)."""
        generator = self._at(stream, step)
        return torch.rand(self.global_batch_size, generator=generator, device=generator.device)[self.rows]

    def timesteps(self, step, sampler):
        """(rows,) timesteps and loss weights from a schedule sampler."""
        generator = self._at(TIMESTEP, step)
        t, weights = sampler.sample(self.global_batch_size, generator.device, generator)
        return t[self.rows], weights[self.rows]
