"""Paths x_t = alpha(t) x_1 + sigma(t) x_0 from noise x_0 (t = 0) to data x_1 (t = 1), and what follows from them.

With r = alpha' / alpha and g = r sigma^2 - sigma sigma', velocity and score of the distributions along a path are
related by v = r x + g s (SiT, section 2). Times have shape (N,), the other tensors (N, C, ...).
"""
import math

import torch

DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")


class Path:
    """A path by its `coefficients`; the rest follows from them."""

    is_singular_at_noise = True  # whether r is infinite at t = 0

    def coefficients(self, t):
        """Return alpha, sigma and their derivatives, each of the shape of t."""
        raise NotImplementedError

    def drift_coefficients(self, t):
        """Return r and g of the velocity v = r x + g s, each of the shape of t."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        r = d_alpha / alpha
        return r, r * sigma**2 - sigma * d_sigma

    def interpolate(self, t, x_0, x_1):
        """Return the point x_t between noise and data, and the velocity there, alpha' x_1 + sigma' x_0."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(expand_as(t, x_1))
        return alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0

    def velocity_from_score(self, x, t, score):
        """Return the velocity at x that belongs to a score."""
        r, g = self.drift_coefficients(expand_as(t, x))
        return r * x + g * score

    def score_from_velocity(self, x, t, velocity):
        """Return the score at x that belongs to a velocity; finite at t = 0, where r is not."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(expand_as(t, x))
        inverse_r = alpha / d_alpha
        return (inverse_r * velocity - x) / (sigma**2 - inverse_r * d_sigma * sigma)

    def diffusion(self, t, form="SBDM", norm=1.0):
        """Return the diffusion coefficient w(t) >= 0 of an SDE with the marginals of the path (SiT, section 2).

        Args:
            t (Tensor): Times, of any shape, which the result has too.
            form (str): One of `DIFFUSION_FORMS`; "SBDM" is g, which is infinite at t = 0 on Linear and GVP.
            norm (float): Factor of the coefficient.
        """
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "SBDM":
            return norm * self.drift_coefficients(t)[1]
        if form == "sigma":
            return norm * self.coefficients(t)[1]
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        raise ValueError(f"unknown diffusion_form {form!r}: use one of {', '.join(DIFFUSION_FORMS)}")


class LinearPath(Path):
    """Straight lines: alpha = t, sigma = 1 - t."""

    def coefficients(self, t):
        """Return alpha, sigma and their derivatives; see `Path`."""
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


class GVPPath(Path):
    """Generalized variance preserving: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def coefficients(self, t):
        """Return alpha, sigma and their derivatives; see `Path`."""
        angle = t * math.pi / 2
        sin, cos = torch.sin(angle), torch.cos(angle)
        return sin, cos, cos * math.pi / 2, -sin * math.pi / 2


class VPPath(Path):
    """The variance-preserving diffusion with a linear beta (Song et al., 2020, arXiv 2011.13456), continuous in time.

    With noise time 1 - t: log alpha = -(1 - t)^2 (beta_max - beta_min) / 4 - (1 - t) beta_min / 2 and
    sigma^2 = 1 - alpha^2. At t = 0 a little of the data is left: alpha = 0.0066.
    """

    is_singular_at_noise = False

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def coefficients(self, t):
        """Return alpha, sigma and their derivatives; see `Path`."""
        s, slope = 1 - t, self.beta_max - self.beta_min
        log_alpha = -0.25 * s**2 * slope - 0.5 * s * self.beta_min
        r, _ = self.drift_coefficients(t)
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        return alpha, sigma, alpha * r, -(alpha**2) * r / sigma

    def drift_coefficients(self, t):
        """Return r and g, which are both beta / 2 here."""
        half_beta = 0.5 * (self.beta_min + (1 - t) * (self.beta_max - self.beta_min))
        return half_beta, half_beta


PATHS = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}


def expand_as(t, x):
    """Return times (N,) as (N, 1, ...), with the number of dimensions of x."""
    return t.view(-1, *(1,) * (x.ndim - 1))
