"""Cost of the diffusion process in addition to the network, compared with the plain formulas."""
import numpy as np
import torch

from benchmarks.timing import compare, run_benchmark
from diffusion import create_diffusion


class PlainFormulas:
    """DDPM as published code computes a step, as a baseline: tables are copied and expanded at every use."""

    def __init__(self, process):
        self.process = process

    def table(self, name, t, shape):
        """Return a table's values at timesteps t, expanded to `shape`."""
        values = torch.from_numpy(getattr(self.process, name)).to(t.device)[t].float()
        return values.view(-1, *(1,) * (len(shape) - 1)) + torch.zeros(shape, device=t.device)

    def posterior_mean(self, x_0, x_t, t):
        """Return the mean of q(x_{t-1} | x_t, x_0)."""
        return (self.table("posterior_mean_coef1", t, x_t.shape) * x_0
                + self.table("posterior_mean_coef2", t, x_t.shape) * x_t)

    def reverse_step(self, output, x_t, t):
        """Return mean, variance and log variance of p(x_{t-1} | x_t)."""
        eps, values = torch.split(output, x_t.shape[1], dim=1)
        low = self.table("posterior_log_variance_clipped", t, x_t.shape)
        high = self.table("log_betas", t, x_t.shape)
        v = (values + 1) / 2
        log_variance = v * high + (1 - v) * low
        variance = torch.exp(log_variance)
        x_0 = (self.table("sqrt_recip_alphas_cumprod", t, x_t.shape) * x_t
               - self.table("sqrt_recipm1_alphas_cumprod", t, x_t.shape) * eps)
        return self.posterior_mean(x_0, x_t, t), variance, log_variance

    def model_timesteps(self, t):
        """Return the timesteps that the network sees."""
        return torch.tensor(self.process.timestep_map, device=t.device)[t]

    def sample_step(self, output, x_t, t):
        """Sample x_{t-1}."""
        self.model_timesteps(t)
        mean, _, log_variance = self.reverse_step(output, x_t, t)
        noise = torch.randn_like(x_t)
        return mean + (t != 0).float().view(-1, 1, 1, 1) * torch.exp(0.5 * log_variance) * noise

    def q_sample(self, x_0, t, noise):
        """Sample x_t ~ q(x_t | x_0)."""
        return (self.table("sqrt_alphas_cumprod", t, x_0.shape) * x_0
                + self.table("sqrt_one_minus_alphas_cumprod", t, x_0.shape) * noise)

    def losses(self, output, x_0, t, noise):
        """Return the training loss of each sample, shape (N,)."""
        x_t = self.q_sample(x_0, t, noise)
        self.model_timesteps(t)
        eps, values = torch.split(output, x_t.shape[1], dim=1)
        frozen = torch.cat([eps.detach(), values], dim=1)
        true_mean = self.posterior_mean(x_0, x_t, t)
        true_log_variance = self.table("posterior_log_variance_clipped", t, x_t.shape)
        self.table("posterior_variance", t, x_t.shape)
        mean, _, log_variance = self.reverse_step(frozen, x_t, t)
        kl = 0.5 * (-1.0 + log_variance - true_log_variance + torch.exp(true_log_variance - log_variance)
                    + (true_mean - mean) ** 2 * torch.exp(-log_variance))

        def cdf(x):
            return 0.5 * (1.0 + torch.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * torch.pow(x, 3))))

        centered, inv_std = x_0 - mean, torch.exp(-0.5 * log_variance)
        plus, minus = cdf(inv_std * (centered + 1 / 255)), cdf(inv_std * (centered - 1 / 255))
        log_plus, log_minus = torch.log(plus.clamp(min=1e-12)), torch.log((1 - minus).clamp(min=1e-12))
        inside = torch.log((plus - minus).clamp(min=1e-12))
        nll = -torch.where(x_0 < -0.999, log_plus, torch.where(x_0 > 0.999, log_minus, inside))
        kl, nll = kl.mean(dim=(1, 2, 3)) / np.log(2.0), nll.mean(dim=(1, 2, 3)) / np.log(2.0)
        return ((noise - eps) ** 2).mean(dim=(1, 2, 3)) + torch.where(t == 0, nll, kl)


def measure(device, warm_up=80, count=15, calls=40):
    """Return the milliseconds of a sampling step (8x4x32x32) and of a loss (32x4x32x32) without the network."""
    diffusion = create_diffusion("")
    plain = PlainFormulas(diffusion)
    x, output = torch.randn(8, 4, 32, 32, device=device), torch.randn(8, 8, 32, 32, device=device)
    t = torch.full((8,), 500, device=device)
    pairs = {"sampling step": (lambda: diffusion.p_sample(lambda *_: output, x, t, clip_denoised=False)["sample"],
                               lambda: plain.sample_step(output, x, t))}
    x_start, noise = (torch.randn(32, 4, 32, 32, device=device) for _ in range(2))
    outputs = torch.randn(32, 8, 32, 32, device=device)
    for name, first in (("training losses", 1), ("the same with a t = 0", 0)):  # 97 of 100 batches of 32 have none
        timesteps = torch.randint(1, 1000, (32,), device=device)
        timesteps[0] = first
        pairs[name] = (
            lambda t=timesteps: diffusion.training_losses(lambda *_: outputs, x_start, t, noise=noise)["loss"],
            lambda t=timesteps: plain.losses(outputs, x_start, t, noise))
        torch.testing.assert_close(*(function() for function in pairs[name]))
    results = {}
    for name, (ours, theirs) in pairs.items():
        with torch.no_grad():
            rows = compare(dict(ours=lambda f=ours: f, plain=lambda f=theirs: f), device, warm_up, count, calls)
        times = {key: row["seconds"] * 1e3 for key, row in rows.items()}
        results[name] = dict(ours_ms=times["ours"], plain_ms=times["plain"], ratio=times["ours"] / times["plain"])
    return results


def format_row(name, row):
    """Return the line of a row."""
    return f"{name:22s} ours {row['ours_ms']:.3f} ms   plain {row['plain_ms']:.3f} ms   ratio {row['ratio']:.2f}"


def main():
    """Run the benchmark from the command line."""
    run_benchmark("diffusion_overhead", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
