"""Samplers of a transport: probability-flow ODE, reverse SDE, and the likelihood by the ODE (SiT, section 2)."""
from functools import partial

import torch

from .integrators import integrate_ode, integrate_sde
from .paths import DIFFUSION_FORMS, expand_as

SDE_METHODS = ("Euler", "Heun")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Sampler:
    """Build sampling functions for a transport.

    What the methods return is called with noise of shape (N, C, ...), a model, and further arguments of the model.

    Args:
        transport (Transport): The path and the prediction that the model was trained for.
    """

    def __init__(self, transport):
        self.transport = transport

    def sample_ode(self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3, reverse=False):
        """Build a sampler by the probability-flow ODE.

        Gradients flow through the solver, unless the caller disables them.

        Args:
            sampling_method (str): "euler", "midpoint", "heun", or a method of torchdiffeq, such as "dopri5".
            num_steps (int): Number of times at which the solution is returned, the first included; a method with
                fixed steps takes num_steps - 1.
            atol (float): Absolute tolerance of an adaptive method.
            rtol (float): Its relative tolerance.
            reverse (bool): From data to noise.

        Returns:
            callable: (x, model, **model_kwargs) -> solution at all times, shape (num_steps, N, C, ...).
        """
        times = self._times(*self.transport.ode_interval(reverse), num_steps)

        def sample(x, model, **model_kwargs):
            def f(t, state):
                return (self.transport.velocity(model, state[0], _batch_of(t, state[0]), **model_kwargs),)

            return torch.stack([state[0] for state in integrate_ode(f, (x,), times, sampling_method, atol, rtol)])

        return sample

    def sample_sde(self, *, sampling_method="Euler", diffusion_form="SBDM", diffusion_norm=1.0, last_step="Mean",
                   last_step_size=0.04, num_steps=250):
        """Build a sampler by the SDE dx = (v + w s) dt + sqrt(2 w) dW, whose marginals are those of the path.

        Args:
            sampling_method (str): "Euler" or "Heun", which calls the model twice a step.
            diffusion_form (str): Coefficient w over time, one of `DIFFUSION_FORMS`.
            diffusion_norm (float): Factor of the coefficient.
            last_step (str | None): Step to t = 1 without noise: "Mean" (by the drift of the SDE), "Euler" (by the
                velocity), "Tweedie" (the expected data), or None for a step like the others.
            last_step_size (float): Its length.
            num_steps (int): Number of steps, the last included.

        Returns:
            callable: (x, model, noise_fn=None, **model_kwargs) -> list of x after each step, num_steps of them.
            `noise_fn` maps x to standard normal noise, once a step; by default `torch.randn` on the CPU draws it.

        Raises:
            ValueError: If a name is unknown or a number out of range.
        """
        for name, value, choices in (("sampling_method", sampling_method, SDE_METHODS),
                                     ("diffusion_form", diffusion_form, DIFFUSION_FORMS),
                                     ("last_step", last_step, LAST_STEPS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(map(str, choices))}")
        last_step_size = last_step_size if last_step else 0.0
        if last_step and not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size must lie in (0, 1), not {last_step_size}")
        times = self._times(*self.transport.sde_interval(diffusion_form, last_step_size),
                            num_steps if last_step else num_steps + 1)
        arguments = (times, sampling_method, partial(self._diffusion, form=diffusion_form, norm=diffusion_norm),
                     last_step, last_step_size)

        @torch.no_grad()
        def sample(x, model, noise_fn=_cpu_noise, **model_kwargs):
            return list(self._sde_steps(x, model, noise_fn, model_kwargs, *arguments))

        return sample

    def sample_ode_likelihood(self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3):
        """Build a function that computes the log likelihood of data by the probability-flow ODE.

        The divergence of the velocity is estimated with one probe of random signs for the whole path (Hutchinson;
        FFJORD, Grathwohl et al., 2018, arXiv 1810.01367): an unbiased estimate of the log likelihood. Arguments as for
        `sample_ode`.

        Returns:
            callable: (x, model, probe=None, **model_kwargs) -> log likelihood in nats, shape (N,), and the noise that
            the data come from, of the shape of x. `probe` has the shape of x; default: drawn from the global generator.
        """
        times = self._times(*self.transport.ode_interval(), num_steps)[::-1]

        def log_likelihood(x, model, probe=None, **model_kwargs):
            probe = (torch.randint(2, x.shape) * 2 - 1).to(x) if probe is None else probe
            f = partial(self._velocity_and_divergence, model=model, probe=probe, model_kwargs=model_kwargs)
            states = integrate_ode(f, (x, x.new_zeros(len(x))), times, sampling_method, atol, rtol)
            *_, (z, change) = (tuple(value.detach() for value in state) for state in states)
            return self.transport.prior_logp(z) + change, z

        return log_likelihood

    def _times(self, t0, t1, count):
        """Return `count` times from t0 to t1, which the transport's shift spaces."""
        if count < 2:
            raise ValueError(f"num_steps {count} gives no step: use 2 or more")
        return self.transport.spread_times(torch.linspace(0, 1, count, dtype=torch.float64), t0, t1).tolist()

    def _sde_steps(self, x, model, noise_fn, model_kwargs, times, method, diffusion, last_step, last_step_size):
        """Yield x after each step of the SDE, the last included."""

        def drift(x, t):
            velocity, score = self.transport.velocity_and_score(model, x, _batch_of(t, x), **model_kwargs)
            return velocity + diffusion(t) * score

        for state in integrate_sde(drift, diffusion, x, times, method, noise_fn):
            yield (x := state)
        if last_step == "Mean":
            yield x + last_step_size * drift(x, times[-1])
        elif last_step:
            t = _batch_of(times[-1], x)
            velocity, score = self.transport.velocity_and_score(model, x, t, **model_kwargs)
            alpha, sigma, *_ = self.transport.path.coefficients(expand_as(t, x))
            yield x + last_step_size * velocity if last_step == "Euler" else (x + sigma**2 * score) / alpha

    def _diffusion(self, t, form, norm):
        return self.transport.path.diffusion(torch.tensor(t), form, norm)

    def _velocity_and_divergence(self, t, state, model, probe, model_kwargs):
        """Return the velocity and its estimated divergence, shape (N,): both from one call of the model."""
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = self.transport.velocity(model, x, _batch_of(t, x), **model_kwargs)
            (gradient,) = torch.autograd.grad((velocity * probe).sum(), x)
        return velocity.detach(), (gradient * probe).flatten(1).sum(dim=1)


def _batch_of(t, x):
    """Return the time t (float or scalar tensor) for each row of x, shape (N,)."""
    return t.to(x).expand(len(x)) if torch.is_tensor(t) else x.new_full((len(x),), t)


def _cpu_noise(x):
    return torch.randn(x.shape).to(x)
