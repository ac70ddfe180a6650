"""Numerical integration of ODEs and SDEs over given times."""
from itertools import pairwise

import torch


def _euler(f, t, dt, state):
    return _add(state, dt, f(t, state))


def _midpoint(f, t, dt, state):
    return _add(state, dt, f(t + dt / 2, _add(state, dt / 2, f(t, state))))


def _heun(f, t, dt, state):
    slope = f(t, state)
    return _add(_add(state, dt / 2, slope), dt / 2, f(t + dt, _add(state, dt, slope)))


FIXED_STEP_METHODS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "heun2": _heun}


def integrate_ode(f, state, times, method="dopri5", atol=1e-6, rtol=1e-3):
    """Integrate dx/dt = f(t, x) over `times`, yielding the state at each of them, the first included.

    Args:
        f (callable): (t, state) -> derivatives, like the state; t is a float, or a scalar tensor.
        state (tuple[Tensor]): Values at the first time.
        times (list[float]): Increasing or decreasing times.
        method (str): "euler", "midpoint" or "heun" with one step between two times, or a method of torchdiffeq, such
            as "dopri5", which chooses its steps by the tolerances.
        atol (float): Absolute tolerance of an adaptive method.
        rtol (float): Its relative tolerance.

    Raises:
        ModuleNotFoundError: If the method needs torchdiffeq, which is not installed.
        ValueError: If there is no such method; raised by torchdiffeq, which lists its own.
    """
    if method in FIXED_STEP_METHODS:
        return _integrate_fixed(FIXED_STEP_METHODS[method], f, state, times)
    try:
        import torchdiffeq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the method {method!r} needs the package torchdiffeq: pip install torchdiffeq",
                                  name=error.name) from None
    points = torch.tensor(times, dtype=torch.float32, device=state[0].device)
    trace = torchdiffeq.odeint(f, state, points, method=method, atol=atol, rtol=rtol)
    return zip(*trace, strict=True)


def _integrate_fixed(step, f, state, times):
    yield state
    for t, following in pairwise(times):
        state = step(f, t, following - t, state)
        yield state


def _add(state, dt, slope):
    return tuple(value + dt * part for value, part in zip(state, slope, strict=True))


def integrate_sde(drift, diffusion, x, times, method, noise_fn):
    """Integrate dx = drift dt + sqrt(2 w) dW over `times`, yielding x after each step.

    Args:
        drift (callable): (x, t) -> drift, of the shape of x; t is a float.
        diffusion (callable): t -> w, a scalar tensor.
        x (Tensor): Values at the first time.
        times (list[float]): Increasing times.
        method (str): "Euler" (Euler-Maruyama), or "Heun", which adds the noise first and then takes a step of Heun.
        noise_fn (callable): x -> standard normal noise of its shape, called once a step.
    """
    for t, following in pairwise(times):
        dt = following - t
        noise = torch.sqrt(2 * diffusion(t) * dt) * noise_fn(x)
        if method == "Euler":
            x = x + dt * drift(x, t) + noise
        else:
            x = x + noise
            slope = drift(x, t)
            x = x + dt / 2 * (slope + drift(x + dt * slope, following))
        yield x
