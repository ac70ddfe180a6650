"""Terms of the variational bound, in nats."""
import math

import torch


def normal_kl(mean1, log_var1, mean2, log_var2):
    """Compute KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)), elementwise over tensors that broadcast.

    If the two are almost equal, the terms cancel down to float32 rounding; their order is the published one, so that
    the rounding is too.
    """
    return 0.5 * (-1.0 + log_var2 - log_var1 + torch.exp(log_var1 - log_var2)
                  + (mean1 - mean2).square() * torch.exp(-log_var2))


def approx_standard_normal_cdf(x):
    """Approximate the cumulative distribution of N(0, 1) by the tanh formula of GELU (Hendrycks & Gimpel, 2016)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def discretized_gaussian_log_likelihood(x, means, log_scales):
    """Compute the log probability of the bin of width 2/255 around each x under a Gaussian (DDPM, eq. 13).

    The bins are those of 8-bit pixels. Latents have no such bins, but the published training uses them, and another
    width would change the published loss.

    Args:
        x (Tensor): Values in [-1, 1]; the outermost bins reach to infinity.
        means (Tensor): Means, of the shape of x.
        log_scales (Tensor): Log standard deviations, of the shape of x.

    Returns:
        Tensor: Log probabilities, of the shape of x.
    """
    centered, inv_std = x - means, torch.exp(-log_scales)
    upper = approx_standard_normal_cdf((centered + 1.0 / 255.0) * inv_std).masked_fill(x > 0.999, 1.0)
    lower = approx_standard_normal_cdf((centered - 1.0 / 255.0) * inv_std).masked_fill(x < -0.999, 0.0)
    return torch.log((upper - lower).clamp(min=1e-12))


def mean_flat(x):
    """Average over all dimensions but the batch: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)
