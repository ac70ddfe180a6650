"""Noise of a sampling run: the initial latents and the noise of each step, which is overwritten by the next."""
import torch

from common.seeding import SAMPLE_NOISE, seeded_generator


class GlobalRNG:
    """Noise of torch's global generator, drawn in the published order, so that a seed gives the published picture.

    The published sampler draws x_T of N samples, then at each step noise for the doubled batch of guidance, of which
    only the first half matters. It is drawn here too, and also without guidance.
    """

    def __init__(self, seed, device):
        torch.manual_seed(seed)
        self.device, self.buffer = device, torch.empty(0, device=device)

    def initial(self, shape):
        """Draw x_T, of shape (N, C, H, W)."""
        return torch.randn(shape, device=self.device)

    def step(self, x):
        """Draw the noise of one step, of the shape of `x`."""
        if self.buffer.shape != (2 * len(x), *x.shape[1:]):
            self.buffer = torch.empty(2 * len(x), *x.shape[1:], device=self.device)
        return self.buffer.normal_()[: len(x)]


class PerSampleRNG:
    """Noise with one generator per sample: sample i is a function of (seed, i), whatever its batch.

    `indices` are those of the N samples of a batch; `stream` is what the noise is for, a constant of `common.seeding`.
    """

    def __init__(self, seed, indices, device, stream=SAMPLE_NOISE):
        self.generators = [seeded_generator(seed, stream, int(i), device=device) for i in indices]
        self.device, self.buffer = device, torch.empty(0, device=device)

    def initial(self, shape):
        """Draw x_T, of shape (N, C, H, W)."""
        # Not `empty_like`: a tensor in channels-last memory would be filled in another order.
        return self._fill(torch.empty(shape, device=self.device))

    def step(self, x):
        """Draw the noise of one step, of the shape of `x`."""
        if self.buffer.shape != x.shape:
            self.buffer = torch.empty(x.shape, device=self.device)
        return self._fill(self.buffer)

    def _fill(self, noise):
        for row, generator in zip(noise, self.generators):
            row.normal_(generator=generator)
        return noise
