"""Tiny models and networks with random weights, and reference computations."""
import math

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from networks import build_dit

MODEL_SIZES = {
    "DiT-XL/2": (28, 1152, 16, 2, 674_834_720, 118.62),
    "DiT-XL/4": (28, 1152, 16, 4, 675_000_704, 29.04),
    "DiT-XL/8": (28, 1152, 16, 8, 675_664_640, 7.39),
    "DiT-L/2": (24, 1024, 16, 2, 457_840_672, 80.70),
    "DiT-L/4": (24, 1024, 16, 4, 457_988_224, 19.70),
    "DiT-L/8": (24, 1024, 16, 8, 458_578_432, 5.01),
    "DiT-B/2": (12, 768, 12, 2, 130_315_808, 23.01),
    "DiT-B/4": (12, 768, 12, 4, 130_426_496, 5.57),
    "DiT-B/8": (12, 768, 12, 8, 130_869_248, 1.42),
    "DiT-S/2": (12, 384, 6, 2, 32_865_056, 6.06),
    "DiT-S/4": (12, 384, 6, 4, 32_920_448, 1.41),
    "DiT-S/8": (12, 384, 6, 8, 33_142_016, 0.36),
}
TINY_MODEL = dict(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=7)


def random_weights(model, seed=0, scale=0.2):
    """Fill a model with random weights, so that its output depends on all of them, and return it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=scale, generator=generator)
    return model


def random_model(scale=0.3, **config):
    """Return a tiny DiT whose output depends on all weights; with its initial weights it would be zero."""
    return random_weights(build_dit(**TINY_MODEL | config).eval(), scale=scale)


def random_inception():
    """Return torchvision's Inception with random weights that keep activations at a sensible size."""
    from torchvision.models import inception_v3
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.3)
    return network.eval()


def inputs(model, n=3):
    """Draw latents, timesteps and labels for a model, n of each; no label is the null class."""
    return (torch.randn(n, *model.sample_shape), torch.randint(1000, (n,)),
            torch.randint(model.config.num_classes, (n,)))


def count_gmacs(model):
    """Count the multiply-adds of a forward pass for one image, on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *model.sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2 / 1e9


def reference_attention(layer, x, heads):
    """Compute softmax(q k / sqrt(head width)) v; the rows of the qkv weight are q, k, v, each head by head."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return layer.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def reference_mlp(layer, x):
    """Compute an MLP with the tanh approximation of GELU."""
    h = layer.fc1(x)
    return layer.fc2(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


def constant(*values):
    """Return a network whose output is always these tensors, concatenated over channels."""
    return lambda x, t: torch.cat([value.expand_as(x) for value in values], dim=1)


def column(array):
    """Reshape (T,) to float64 (T, 1, 1, 1), for a batch with one sample for each step."""
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).view(-1, 1, 1, 1)


def every_step(diffusion):
    """Return t = 0 .. T - 1 as one batch, with two random tensors of that batch size."""
    t = torch.arange(diffusion.num_timesteps)
    return t, torch.randn(len(t), 1, 2, 2), torch.randn(len(t), 1, 2, 2)


class ExactGaussian(torch.nn.Module):
    """What a perfect model of a transport predicts if all data are normal with this mean and standard deviation."""

    def __init__(self, transport, mean, std):
        super().__init__()
        self.transport, self.mean, self.std = transport, mean, std

    def marginal(self, t):
        """Return mean and standard deviation of x_t; t is a tensor or a float."""
        alpha, sigma, *_ = self.transport.path.coefficients(torch.as_tensor(t))
        return alpha * self.mean, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def forward(self, x, t):
        t = (t.view(-1, *(1,) * (x.ndim - 1)) / self.transport.time_scale).clamp(max=1 - 1e-7)  # VP: an infinity
        alpha, sigma, d_alpha, d_sigma = self.transport.path.coefficients(t)
        mean, std = self.marginal(t)
        if self.transport.prediction == "velocity":
            slope = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / std**2
            return d_alpha * self.mean + slope * (x - mean)
        score = (mean - x) / std**2
        return score if self.transport.prediction == "score" else -sigma * score
