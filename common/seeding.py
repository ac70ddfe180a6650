"""Random numbers as a function of what they are for: (seed, stream, step or epoch or sample).

Nothing of a generator's state is ever saved: a resumed run, or one on another number of processes, draws the same.
"""

import numpy as np
import torch

# One number for each use, so that two uses never share a sequence. Changing one changes every trajectory.
WEIGHTS, DATA_ORDER, FLIP, TIMESTEP, NOISE, LABEL_DROP, POSTERIOR, SAMPLE_LABEL, SAMPLE_NOISE, LIKELIHOOD = range(10)
# The fractional part of the golden ratio in 64 bits: odd, so that multiples of it differ in their low bits too.
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


def derive_seed(*key):
    """Mix non-negative integers below 2**64 to one seed in [0, 2**63).

    Seeds that differ only in the key's last number (a step, an epoch, a sample) are distinct even in their low 32 bits,
    which are all that torch's generator on the CPU looks at.
    """
    *use, last = key
    # SeedSequence takes (1,) and (1, 0) for the same, so that the length goes in, and every number as two words.
    words = [len(key), *(half for number in use for half in (number & 0xFFFFFFFF, number >> 32))]
    base = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return (base + GOLDEN_RATIO_64 * last) % 2**63


def seeded_generator(*key, device="cpu"):
    """A torch generator on `device` that starts at the sequence of `key`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


class BatchRNG:
    """Random numbers of a training step, a function of (seed, step, position in the global batch).

    Every process draws for the whole global batch, on its device, and takes its own rows: for latents this costs
    microseconds, needs no communication, and does not depend on the number of processes. (On CUDA, torch's generator
    cuts large draws by the GPU's number of multiprocessors: GPUs of another model may draw otherwise.)

    rows  the slice of the global batch that this process computes
    """

    def __init__(self, seed, global_batch_size, rows, device):
        self.seed, self.global_batch_size, self.rows = seed, global_batch_size, rows
        self.generator = torch.Generator(device)

    def _at(self, stream, step):
        return self.generator.manual_seed(derive_seed(self.seed, stream, step))

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
