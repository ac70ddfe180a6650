"""Noise of a sampling run: the initial latents and the noise of each step."""
import torch

from common.seeding import SAMPLE_NOISE, seeded_generator


class GlobalRNG:
    """Noise of torch's global generator, drawn in the published order, so that a seed gives the published picture.

    The published sampler draws x_T of N samples, then at each step noise for the doubled batch of guidance, of which
    only the first half matters. It is drawn here too, and also without guidance.
    """

    def __init__(self, seed, device):
        torch.manual_seed(seed)
        self.device = device

    def initial(self, shape):
        """Draw x_T, of shape (N, C, H, W)."""
        return torch.randn(shape, device=self.device)

    def step(self, x):
        """Draw the noise of one step, of the shape of `x`."""
        return torch.randn(2 * len(x), *x.shape[1:], device=x.device)[: len(x)]


class PerSampleRNG:
    """Noise with one generator per sample: sample i is a function of (seed, i), whatever its batch.

    `indices` are those of the N samples of a batch; `stream` is what the noise is for, a constant of `common.seeding`.
    """

    def __init__(self, seed, indices, device, stream=SAMPLE_NOISE):
        self.generators = [seeded_generator(seed, stream, int(i), device=device) for i in indices]
        self.device = device

    def initial(self, shape):
        """Draw x_T, of shape (N, C, H, W)."""
        # Not `empty_like`: a tensor in channels-last memory would be filled in another order.
        noise = torch.empty(shape, device=self.device)
        for row, generator in zip(noise, self.generators):
            row.normal_(generator=generator)
        return noise

    def step(self, x):
        """Draw the noise of one step, of the shape of `x`."""
        return self.initial(x.shape)
