"""Where the noise of sampling comes from."""
import torch

from common.seeding import SAMPLE_NOISE, seeded_generator


class GlobalRNG:
    """Noise of the global generator in the published order: x_T of N samples, then at every step a draw for the doubled
    batch of guidance, of which the first half is used. So a seed gives the picture that it gave with published code,
    also at guidance scale 1, where the second half of the network's batch is not computed.
    """

    def __init__(self, seed, device):
        torch.manual_seed(seed)
        self.device = device

    def initial(self, shape):
        return torch.randn(shape, device=self.device)

    def step(self, x):
        return torch.randn(2 * len(x), *x.shape[1:], device=x.device)[: len(x)]


class PerSampleRNG:
    """Noise of each sample from a generator of its own: sample i is a function of (seed, i), whatever its batch.

    stream  of `common.seeding`: what the noise is for
    """

    def __init__(self, seed, indices, device, stream=SAMPLE_NOISE):
        self.generators = [seeded_generator(seed, stream, int(i), device=device) for i in indices]
        self.device = device

    def initial(self, shape):
        # Not like another tensor: where that lies in memory channels last, numbers would come in another order.
        noise = torch.empty(shape, device=self.device)
        for row, own in zip(noise, self.generators):
            row.normal_(generator=own)
        return noise

    def step(self, x):
        return self.initial(x.shape)
