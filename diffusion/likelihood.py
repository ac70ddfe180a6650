"""Two likelihood terms of the variational bound, in nats."""
import math

import torch


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)), element by element.

    Tensors that broadcast against each other. Where the two are nearly alike, the terms cancel down to float32
    rounding; their order is the published one, so that what is left is the published rounding too.
    """
    return 0.5 * (-1.0 + log_var2 - log_var1 + torch.exp(log_var1 - log_var2)
                  + (mean1 - mean2).square() * torch.exp(-log_var2))


def approx_standard_normal_cdf(x):
    """Cumulative distribution of N(0, 1) by the tanh formula of GELU (Hendrycks & Gimpel, 2016)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def discretized_gaussian_log_likelihood(x, means, log_scales):
    """Log probability of the bin of width 2/255 around each x in [-1, 1] under a Gaussian (DDPM, eq. 13).

    x, means, log_scales  same shape; log_scales is the log standard deviation. The outermost bins reach to infinity.

    The bins are those of 8-bit pixels. DiT diffuses latents, which have no such bins; the published training uses
    them all the same, and so does this code, since another width would change the published loss.
    """
    centered, inv_std = x - means, torch.exp(-log_scales)
    upper = approx_standard_normal_cdf((centered + 1.0 / 255.0) * inv_std).masked_fill(x > 0.999, 1.0)
    lower = approx_standard_normal_cdf((centered - 1.0 / 255.0) * inv_std).masked_fill(x < -0.999, 0.0)
    return torch.log((upper - lower).clamp(min=1e-12))


def mean_flat(x):
    """(N, ...) -> (N,): the mean over everything but the batch."""
    return x.flatten(1).mean(dim=1)
