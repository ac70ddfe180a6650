"""Random numbers as a function of their use: (seed, stream, step or epoch or sample).

No state of a generator is saved: a resumed run, or one on another number of ranks, draws the same numbers.
"""

import numpy as np
import torch

# Streams: one number for each use, so that two uses never share a sequence. Changing one changes every run.
WEIGHTS, DATA_ORDER, FLIP, TIMESTEP, NOISE, LABEL_DROP, POSTERIOR, SAMPLE_LABEL, SAMPLE_NOISE, LIKELIHOOD = range(10)
# The fractional part of the golden ratio in 64 bits: odd, so that multiples of it differ in their low bits too.
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


def derive_seed(*key):
    """Mix a key to one seed in [0, 2**63).

    Seeds that differ only in the last number of the key (a step, an epoch, a sample) are distinct even in their low
    32 bits, which are all that torch's generator on the CPU uses.

    Args:
        *key (int): Non-negative numbers below 2**64.
    """
    *use, last = key
    # SeedSequence does not distinguish (1,) and (1, 0): mix in the length, and every number as two words.
    words = [len(key), *(half for number in use for half in (number & 0xFFFFFFFF, number >> 32))]
    base = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return (base + GOLDEN_RATIO_64 * last) % 2**63


def seeded_generator(*key, device="cpu"):
    """Return a torch generator on `device`, seeded with `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


class BatchRNG:
    """Random numbers of a training step as a function of (seed, step, position in the global batch).

    Every rank draws for the global batch on its device and takes its rows: for latents this costs microseconds, needs
    no communication, and does not depend on the number of ranks. (On CUDA, torch's generator divides large draws by
    the number of multiprocessors, so that another GPU model may draw other numbers.)

    Args:
        seed (int): Seed of the run.
        global_batch_size (int): Number of rows over all ranks.
        rows (slice): Rows of the global batch that this rank computes, n of them.
        device (torch.device | str): Where to draw.
    """

    def __init__(self, seed, global_batch_size, rows, device):
        self.seed, self.global_batch_size, self.rows = seed, global_batch_size, rows
        self.generator = torch.Generator(device)

    def normal(self, stream, step, shape):
        """Draw standard normal numbers, shape (n, *shape)."""
        generator = self._seed(stream, step)
        return torch.randn(self.global_batch_size, *shape, generator=generator, device=generator.device)[self.rows]

    def uniform(self, stream, step):
        """Draw uniform numbers in [0, 1), shape (n,)."""
        generator = self._seed(stream, step)
        return torch.rand(self.global_batch_size, generator=generator, device=generator.device)[self.rows]

    def timesteps(self, step, sampler):
        """Draw timesteps (n,) and their loss weights (n,) from a `ScheduleSampler`."""
        generator = self._seed(TIMESTEP, step)
        t, weights = sampler.sample(self.global_batch_size, generator.device, generator)
        return t[self.rows], weights[self.rows]

    def _seed(self, stream, step):
        return self.generator.manual_seed(derive_seed(self.seed, stream, step))
