"""The diffusion process against closed forms.

Many tests use data whose optimal network is known: if x_0 ~ N(m, s^2) in each dimension, then x_t is Gaussian too, and
so are the samples. `GaussianNetwork` is that network.
"""
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from diffusion.schedules import named_betas, space_timesteps

BETAS = np.linspace(1e-4, 0.02, 1000)  # DDPM, section 4
ALPHA_BAR = np.cumprod(1.0 - BETAS)
SHAPE = (3, 2, 4, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class GaussianNetwork:
    """Predict the noise E[eps | x_t] of data N(mean, std^2) and, given the kept steps, the exact reverse variance."""

    def __init__(self, mean, std, kept=None):
        scale = np.sqrt(1 - ALPHA_BAR) / (ALPHA_BAR * std**2 + 1 - ALPHA_BAR)
        tables = [scale, -scale * np.sqrt(ALPHA_BAR) * mean]
        if kept is not None:
            values, bar = np.zeros(1000), ALPHA_BAR[kept]
            prev = np.append(1.0, bar[:-1])
            beta = 1 - bar / prev
            prior = prev * std**2 + 1 - prev  # Var x_{t-1}; Bayes' rule with Var[x_t | x_{t-1}] = beta_t:
            exact = prior * beta / (prior * bar / prev + beta)
            small = beta * (1 - prev) / (1 - bar)
            small[0] = small[1]
            values[kept] = 2 * np.log(exact / small) / np.log(beta / small) - 1
            tables.append(values)
        self.tables = torch.tensor(np.stack(tables), dtype=torch.float32)

    def __call__(self, x, t):
        scale, offset, *values = self.tables[:, t].view(-1, len(t), *(1,) * (x.ndim - 1))
        return torch.cat([scale * x + offset, *(value.expand_as(x) for value in values)], dim=1)


def constant(*values):
    """Return a network whose output is always these tensors, concatenated over channels."""
    return lambda x, t: torch.cat([value.expand_as(x) for value in values], dim=1)


def fixed(noise):
    """Return a noise_fn that returns the same noise at every step."""
    return lambda x: noise


def at(t, n=SHAPE[0]):
    return torch.full((n,), t)


def column(array):
    """Reshape (T,) to float64 (T, 1, 1, 1), for a batch with one sample for each step."""
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).view(-1, 1, 1, 1)


def every_step(diffusion):
    """Return t = 0 .. T - 1 as one batch, with two random tensors of that batch size."""
    t = torch.arange(diffusion.num_timesteps)
    return t, torch.randn(len(t), 1, 2, 2), torch.randn(len(t), 1, 2, 2)


# ---------------------------------------------------------------- the published interface

def test_create_diffusion_keeps_its_arguments_and_defaults():
    parameters = inspect.signature(create_diffusion).parameters
    assert next(iter(parameters)) == "timestep_respacing"
    assert [(name, p.default) for name, p in parameters.items()][1:] == list(dict(
        noise_schedule="linear", use_kl=False, sigma_small=False, predict_xstart=False, learn_sigma=True,
        rescale_learned_sigmas=False, diffusion_steps=1000).items())


@pytest.mark.parametrize("method, arguments", [
    ("q_mean_variance", "x_start t"),
    ("q_sample", "x_start t noise"),
    ("q_posterior_mean_variance", "x_start x_t t"),
    ("p_mean_variance", "model x t clip_denoised denoised_fn model_kwargs"),
    ("p_sample", "model x t clip_denoised denoised_fn cond_fn model_kwargs"),
    ("p_sample_loop", "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress"),
    ("p_sample_loop_progressive", "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress"),
    ("ddim_sample", "model x t clip_denoised denoised_fn cond_fn model_kwargs eta"),
    ("ddim_sample_loop", "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress eta"),
    ("ddim_sample_loop_progressive",
     "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device progress eta"),
    ("ddim_reverse_sample", "model x t clip_denoised denoised_fn cond_fn model_kwargs eta"),
    ("training_losses", "model x_start t model_kwargs noise"),
    ("calc_bpd_loop", "model x_start clip_denoised model_kwargs"),
])
def test_published_arguments_keep_their_place(method, arguments):
    names = ["self", *arguments.split()]
    assert list(inspect.signature(getattr(GaussianDiffusion, method)).parameters)[:len(names)] == names


# ---------------------------------------------------------------- schedules and respacing

@pytest.mark.parametrize("steps, start, end", [(1000, 1e-4, 0.02), (100, 1e-3, 0.2), (4000, 2.5e-5, 0.005)])
def test_linear_schedule_scales_with_its_length(steps, start, end):
    betas = named_betas("linear", steps)
    assert betas.dtype == np.float64 and len(betas) == steps
    np.testing.assert_allclose(betas[[0, -1]], [start, end], rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas), (end - start) / (steps - 1), rtol=1e-9)


def test_cosine_schedule_is_a_squared_cosine_with_capped_betas():
    """Improved DDPM, eq. 17; only the last beta reaches the cap."""
    betas = named_betas("squaredcos_cap_v2", 500)
    wave = np.cos((np.arange(501) / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], wave[1:-1] / wave[0], rtol=1e-9)
    assert betas[-1] == 0.999 and betas[-2] < 0.999


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="quadratic"):
        create_diffusion("", noise_schedule="quadratic")
    with pytest.raises(ValueError, match="diffusion_steps=20"):
        create_diffusion("", diffusion_steps=20)
    with pytest.raises(ValueError, match="diffusion_steps=0"):
        create_diffusion("", noise_schedule="squaredcos_cap_v2", diffusion_steps=0)


@pytest.mark.parametrize("respacing", ["", None, "1000", [1000], "ddim1000", "500,500"])
def test_keeping_every_step_changes_nothing(respacing):
    diffusion = create_diffusion(respacing)
    assert list(diffusion.timestep_map) == list(range(1000)) and diffusion.num_timesteps == 1000
    np.testing.assert_allclose(diffusion.betas, BETAS, rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod, ALPHA_BAR, rtol=1e-10)


@pytest.mark.parametrize("steps, counts, kept", [
    (1000, "ddim50", list(range(0, 1000, 20))),
    (1000, "ddim7", list(range(0, 1000, 143))),
    (10, "4", [0, 3, 6, 9]),
    (10, [5], [0, 2, 4, 7, 9]),   # 2.25 apart
    (9, "3,2", [0, 2, 4, 5, 8]),  # sections of 5 and 4
    (11, [1, 2, 1], [0, 4, 7, 8]),
])
def test_sections_keep_evenly_spaced_steps(steps, counts, kept):
    assert space_timesteps(steps, counts) == kept


def test_sections_of_unequal_density_keep_their_ends():
    kept = space_timesteps(1000, "10,15,20")
    for low, high, count in [(0, 333, 10), (334, 666, 15), (667, 999, 20)]:
        section = [step for step in kept if low <= step <= high]
        assert (len(section), section[0], section[-1]) == (count, low, high)


def test_any_number_of_steps_can_be_kept():
    for count in range(2, 1001):
        kept = space_timesteps(1000, str(count))
        assert len(kept) == len(set(kept)) == count and kept == sorted(kept)
        assert (kept[0], kept[-1]) == (0, 999)
    gaps = np.diff(space_timesteps(1000, "250"))
    assert set(gaps) == {4, 5}  # 999 / 249 = 4.01


@pytest.mark.parametrize("respacing", ["0", "1001", "-5", "501,1", "ddim0", "ddim300", "ddim1001", "ddim-1",
                                       "abc", "10,,20", "10,", "2.5", "ddim", "ddimx"])
def test_impossible_respacings_are_refused(respacing):
    """ddim300: no integer stride keeps 300 of 1000 steps, a stride of 3 keeps 334 and one of 4 keeps 250."""
    named = respacing if not respacing[-1].isdigit() or "." in respacing else respacing.split(",")[0]
    with pytest.raises(ValueError, match=named):
        create_diffusion(respacing)


@pytest.mark.parametrize("respacing", ["250", "10,15,20", "ddim50", "1"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_respaced_process_has_the_same_alpha_bar(respacing, schedule):
    full, short = (create_diffusion(r, noise_schedule=schedule) for r in ("", respacing))
    assert short.num_timesteps == len(short.timestep_map) < 1000
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-9)
    np.testing.assert_array_equal(short.alphas_cumprod_prev, np.append(1.0, short.alphas_cumprod[:-1]))
    np.testing.assert_array_equal(short.alphas_cumprod_next, np.append(short.alphas_cumprod[1:], 0.0))


def test_a_process_may_be_trained_with_fewer_steps():
    diffusion = create_diffusion("4", diffusion_steps=100)
    assert (diffusion.num_timesteps, diffusion.original_num_steps) == (4, 100)
    assert list(diffusion.timestep_map) == [0, 33, 66, 99]
    np.testing.assert_allclose(diffusion.alphas_cumprod, np.cumprod(1 - np.linspace(1e-3, 0.2, 100))[::33], rtol=1e-9)


# ---------------------------------------------------------------- q: the forward process and its posterior

def test_q_sample_is_the_closed_form():
    diffusion = create_diffusion("")
    t, x_0, noise = every_step(diffusion)
    want = column(np.sqrt(ALPHA_BAR)) * x_0 + column(np.sqrt(1 - ALPHA_BAR)) * noise
    torch.testing.assert_close(diffusion.q_sample(x_0, t, noise), want.float(), rtol=1e-5, atol=1e-6)


def test_q_mean_variance_describes_q_sample():
    """Within 5 standard errors of 20,000 draws."""
    diffusion, n = create_diffusion(""), 20_000
    x_0, t = torch.full((n, 1), 0.8), at(300, n)
    mean, variance, log_variance = (value[0].item() for value in diffusion.q_mean_variance(x_0, t))
    assert mean == pytest.approx(0.8 * math.sqrt(ALPHA_BAR[300]), rel=1e-6)
    assert variance == pytest.approx(1 - ALPHA_BAR[300], rel=1e-6)
    assert log_variance == pytest.approx(math.log(1 - ALPHA_BAR[300]), rel=1e-6)
    x_t = diffusion.q_sample(x_0, t)
    assert x_t.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert x_t.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("respacing", ["", "25"])
def test_posterior_is_bayes_rule(respacing):
    """q(x_{t-1} | x_t, x_0) is the normalized product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), two Gaussians."""
    diffusion = create_diffusion(respacing)
    t, x_0, x_t = every_step(diffusion)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    bar = column(ALPHA_BAR[diffusion.timestep_map])
    prev, bar = bar[:-1], bar[1:]
    alpha = bar / prev
    precision = 1 / (1 - prev) + alpha / (1 - alpha)
    want = (prev.sqrt() * x_0[1:] / (1 - prev) + alpha.sqrt() * x_t[1:] / (1 - alpha)) / precision
    torch.testing.assert_close(mean[1:], want.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance[1:], (1 / precision).float().expand_as(x_0[1:]), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_variance[1:].exp(), variance[1:], rtol=1e-5, atol=0)
    # at t = 0 the posterior is x_0; its log variance is that of t = 1, not minus infinity
    torch.testing.assert_close(mean[0], x_0[0])
    assert not variance[0].any() and torch.equal(log_variance[0], log_variance[1])


def test_q_refuses_shapes_that_differ():
    diffusion = create_diffusion("")
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 4\).*\(3, 2, 4, 4\)"):
        diffusion.q_sample(torch.zeros(SHAPE), at(5), torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(3, 2, 4, 4\)"):
        diffusion.q_posterior_mean_variance(torch.zeros(1, 2, 4, 4), torch.zeros(SHAPE), at(5))


# ---------------------------------------------------------------- p: the reverse step

def test_predictions_of_noise_and_of_x_0_are_equivalent():
    for kwargs in (dict(), dict(predict_xstart=True)):
        diffusion = create_diffusion("", learn_sigma=False, **kwargs)
        t, x_0, noise = every_step(diffusion)
        x_t = diffusion.q_sample(x_0, t, noise)
        model = constant(x_0 if kwargs else noise)
        step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=False)
        torch.testing.assert_close(step["pred_xstart"], x_0, rtol=0, atol=1e-4)  # 1 / sqrt(alpha_bar) is up to 157
        torch.testing.assert_close(step["mean"], diffusion.q_posterior_mean_variance(x_0, x_t, t)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("respacing", ["", "25"])
def test_learned_variance_lies_between_the_two_bounds(respacing):
    """Improved DDPM, eq. 15: -1 gives btilde_t, 1 gives beta_t, 0 their geometric mean."""
    diffusion = create_diffusion(respacing)
    t, x, _ = every_step(diffusion)
    small = np.append(diffusion.posterior_variance[1], diffusion.posterior_variance[1:])
    for value, want in [(-1.0, small), (1.0, diffusion.betas), (0.0, np.sqrt(small * diffusion.betas))]:
        step = diffusion.p_mean_variance(constant(x, torch.tensor(value)), x, t)
        torch.testing.assert_close(step["variance"], column(want).float().expand_as(x), rtol=1e-5, atol=0)
        torch.testing.assert_close(step["log_variance"], column(np.log(want)).float().expand_as(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma_small", [False, True])
def test_fixed_variance_is_beta_or_btilde(sigma_small):
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=sigma_small)
    t, x, _ = every_step(diffusion)
    step = diffusion.p_mean_variance(constant(x), x, t)
    second = diffusion.posterior_variance[1]
    variance = diffusion.posterior_variance if sigma_small else np.append(second, BETAS[1:])
    log_variance = np.log(np.append(second, variance[1:]))
    torch.testing.assert_close(step["variance"], column(variance).float().expand_as(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(step["log_variance"], column(log_variance).float().expand_as(x), rtol=1e-5, atol=0)


def test_denoised_fn_comes_before_clipping():
    diffusion = create_diffusion("", predict_xstart=True, learn_sigma=False)
    x, t = torch.randn(SHAPE), at(10)
    for denoised_fn, clip, want in [(None, False, 3.0), (None, True, 1.0), (lambda x: x - 2.5, True, 0.5),
                                    (lambda x: -2 * x, True, -1.0), (lambda x: -2 * x, False, -6.0)]:
        step = diffusion.p_mean_variance(constant(torch.tensor(3.0)), x, t, clip, denoised_fn)
        x_0 = torch.full_like(x, want)
        assert torch.equal(step["pred_xstart"], x_0)
        assert torch.equal(step["mean"], diffusion.q_posterior_mean_variance(x_0, x, t)[0])


@pytest.mark.parametrize("learn_sigma, factor", [(True, 1), (False, 2), (True, 3)])
def test_a_network_of_the_wrong_width_is_refused(learn_sigma, factor):
    diffusion = create_diffusion("", learn_sigma=learn_sigma)
    x, t = torch.zeros(SHAPE), at(5)
    for step in (diffusion.p_mean_variance, diffusion.p_sample, diffusion.ddim_sample, diffusion.ddim_reverse_sample,
                 diffusion.training_losses):
        with pytest.raises(ValueError, match=rf"\(3, {2 * factor}, 4, 4\).*\(3, 2, 4, 4\)"):
            step(constant(*[x] * factor), x, t)


# ---------------------------------------------------------------- samplers on data with a known answer

def response(loop, steps):
    """Compute mean and standard deviation of the samples of an affine sampler, without random noise.

    Sample 0 gets no noise and each other sample a unit of it, in x_T or in one step; their difference is the
    contribution of that noise.
    """
    start = torch.zeros(steps + 2, 1, 1, 1)
    start[1] = 1
    calls = itertools.count(2)

    def noise_fn(x):
        noise = torch.zeros_like(x)
        noise[next(calls)] = 1
        return noise

    out = loop(shape=start.shape, noise=start, noise_fn=noise_fn).flatten().double()
    assert next(calls) == steps + 2  # noise was drawn exactly once a step
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("respacing, kwargs, std, tolerance", [
    ("", dict(), 0.5, 3e-4),                       # the exact variance is exact at any number of steps,
    ("100", dict(), 0.5, 3e-4),
    ("10", dict(), 0.5, 3e-4),
    ("10", dict(learn_sigma=False), 1.0, 3e-4),    # as beta_t is for data of unit variance;
    ("", dict(learn_sigma=False, sigma_small=True), 0.5, 5e-3),  # elsewhere it takes many steps
    ("", dict(learn_sigma=False), 0.5, 1e-3),
])
def test_ddpm_recovers_the_data(respacing, kwargs, std, tolerance):
    diffusion = create_diffusion(respacing, **kwargs)
    network = GaussianNetwork(0.7, std, kept=None if kwargs else diffusion.timestep_map)
    got = response(lambda **kw: diffusion.p_sample_loop(network, clip_denoised=False, **kw), diffusion.num_timesteps)
    assert got == pytest.approx((0.7, std), abs=tolerance)


@pytest.mark.parametrize("respacing, eta, tolerance", [("", 0.0, 3e-3), ("", 0.5, 3e-3), ("", 1.0, 5e-3),
                                                       ("100", 0.0, 2e-2)])
def test_ddim_recovers_the_data(respacing, eta, tolerance):
    diffusion = create_diffusion(respacing, learn_sigma=False)
    network = GaussianNetwork(0.7, 0.5)
    got = response(lambda **kw: diffusion.ddim_sample_loop(network, clip_denoised=False, eta=eta, **kw),
                   diffusion.num_timesteps)
    assert got == pytest.approx((0.7, 0.5), abs=tolerance)


def test_random_samples_recover_the_data():
    diffusion, n = create_diffusion("50"), 20_000
    network = GaussianNetwork(0.7, 0.5, kept=diffusion.timestep_map)
    samples = diffusion.p_sample_loop(network, (n, 1), clip_denoised=False, device="cpu")
    assert samples.mean().item() == pytest.approx(0.7, abs=4 * 0.5 / math.sqrt(n))
    assert samples.std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * n))


@pytest.mark.parametrize("respacing", ["", "10"])
def test_ddim_step_with_the_true_noise_leads_to_the_neighboring_steps(respacing):
    """With eta 0 from x_t to x_{t-1} of that noise, and reversed to x_{t+1}."""
    diffusion = create_diffusion(respacing, learn_sigma=False)
    t, x_0, noise = every_step(diffusion)
    x_t = diffusion.q_sample(x_0, t, noise)
    down = diffusion.ddim_sample(constant(noise), x_t, t, clip_denoised=False)["sample"]
    up = diffusion.ddim_reverse_sample(constant(noise), x_t, t, clip_denoised=False)["sample"]
    torch.testing.assert_close(down, torch.cat([x_0[:1], diffusion.q_sample(x_0[1:], t[:-1], noise[1:])]),
                               rtol=0, atol=1e-4)
    torch.testing.assert_close(up, torch.cat([diffusion.q_sample(x_0[:-1], t[1:], noise[:-1]), noise[-1:]]),
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("respacing", ["", "250", "10"])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(respacing):
    """The same mean and the same noise scale at every step: DDIM, section 4.1."""
    diffusion = create_diffusion(respacing, learn_sigma=False, sigma_small=True)
    t, x, _ = every_step(diffusion)
    network = constant(torch.randn_like(x))
    for noise in (torch.zeros_like(x), torch.ones_like(x)):
        ddpm = diffusion.p_sample(network, x, t, noise_fn=fixed(noise))
        ddim = diffusion.ddim_sample(network, x, t, eta=1.0, noise_fn=fixed(noise))
        torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


def test_eta_scales_the_noise_and_the_last_step_adds_none():
    diffusion = create_diffusion("100", learn_sigma=False)
    t, x, _ = every_step(diffusion)
    sigma = {}
    for eta in (0.0, 0.4, 1.0):
        still, noisy = (diffusion.ddim_sample(constant(x), x, t, eta=eta, noise_fn=fixed(z))["sample"]
                        for z in (torch.zeros_like(x), torch.ones_like(x)))
        sigma[eta] = (noisy - still)[:, 0, 0, 0].double()
    want = torch.from_numpy(np.sqrt(diffusion.posterior_variance))  # 0 at t = 0
    assert not sigma[0.0].any()
    torch.testing.assert_close(sigma[1.0], want, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(sigma[0.4], 0.4 * want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kwargs, variance", [(dict(), "betas"), (dict(learn_sigma=False), "betas"),
                                              (dict(learn_sigma=False, sigma_small=True), "posterior_variance")])
def test_ddpm_step_adds_its_variance(kwargs, variance):
    diffusion = create_diffusion("", **kwargs)
    t, x, _ = every_step(diffusion)
    network = constant(x) if kwargs else constant(x, torch.tensor(1.0))
    still, noisy = (diffusion.p_sample(network, x, t, noise_fn=fixed(z))["sample"]
                    for z in (torch.zeros_like(x), torch.ones_like(x)))
    want = column(np.append(0.0, np.sqrt(getattr(diffusion, variance))[1:])).float().expand_as(x)
    assert torch.equal(noisy[0], still[0])
    torch.testing.assert_close(noisy - still, want, rtol=1e-4, atol=1e-6)


def test_ddim_inversion_returns_to_x_0():
    """x_0 -> noise -> x_0; the noise is known to be (x_0 - m) / s."""
    diffusion = create_diffusion("", learn_sigma=False)
    network = GaussianNetwork(0.3, 0.5)
    x_0 = torch.linspace(-1, 1.5, 6).view(6, 1)
    x = x_0
    for t in range(1000):
        x = diffusion.ddim_reverse_sample(network, x, at(t, 6), clip_denoised=False)["sample"]
    torch.testing.assert_close(x, (x_0 - 0.3) / 0.5, rtol=0, atol=1e-2)  # 1000 Euler steps: 8e-3
    back = diffusion.ddim_sample_loop(network, x.shape, noise=x, clip_denoised=False)
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-2)


def test_ddim_with_noise_cannot_be_reversed():
    with pytest.raises(ValueError, match=r"eta.*0\.5"):
        create_diffusion("").ddim_reverse_sample(constant(torch.tensor(0.0)), torch.zeros(SHAPE), at(0), eta=0.5)


# ---------------------------------------------------------------- classifier guidance

class GaussianClassifier:
    """Gradient of log p(y | x_t) for y = x_0 + N(0, tau^2) noise and x_0 ~ N(mean, std^2)."""

    def __init__(self, mean, std, y, tau):
        gain = np.sqrt(ALPHA_BAR) * std**2 / (ALPHA_BAR * std**2 + 1 - ALPHA_BAR)  # d E[x_0 | x_t] / d x_t
        spread = std**2 * (1 - gain * np.sqrt(ALPHA_BAR)) + tau**2                 # Var[y | x_t]
        tables = np.stack([-(gain**2) / spread, gain * (y - mean + gain * np.sqrt(ALPHA_BAR) * mean) / spread])
        self.tables = torch.tensor(tables, dtype=torch.float32)
        # p(x_0 | y), the data that guidance leads to
        self.std = math.sqrt(1 / (1 / std**2 + 1 / tau**2))
        self.mean = self.std**2 * (mean / std**2 + y / tau**2)

    def __call__(self, x, t):
        scale, offset = self.tables[:, t].view(2, len(t), *(1,) * (x.ndim - 1))
        return scale * x + offset


def test_guided_score_is_that_of_the_conditional_data():
    """Bayes' rule for scores: the guided prediction of x_0 is the optimal one for p(x_0 | y), at every step."""
    diffusion = create_diffusion("", learn_sigma=False)
    classifier = GaussianClassifier(0.7, 0.5, y=-0.4, tau=0.6)
    t, x, _ = every_step(diffusion)
    plain = diffusion.p_mean_variance(GaussianNetwork(0.7, 0.5), x, t, clip_denoised=False)
    got = diffusion.condition_score(classifier, plain, x, t)
    want = diffusion.p_mean_variance(GaussianNetwork(classifier.mean, classifier.std), x, t, clip_denoised=False)
    for name in ("pred_xstart", "mean", "variance", "log_variance"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-4)


def test_guided_mean_moves_along_the_gradient():
    diffusion = create_diffusion("25")
    t, x, gradient = every_step(diffusion)
    step = diffusion.p_mean_variance(constant(x, torch.tensor(0.3)), x, t)
    got = diffusion.condition_mean(lambda x, t: gradient, step, x, t)
    torch.testing.assert_close(got, step["mean"] + step["variance"] * gradient)
    sample = diffusion.p_sample(constant(x, torch.tensor(0.3)), x, t, cond_fn=lambda x, t: gradient,
                                noise_fn=torch.zeros_like)
    assert torch.equal(sample["sample"], got) and torch.equal(sample["pred_xstart"], step["pred_xstart"])


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_guided_samplers_recover_the_conditional_data(loop):
    diffusion = create_diffusion("", learn_sigma=False)
    classifier = GaussianClassifier(0.7, 0.5, y=-0.4, tau=0.6)
    got = response(lambda **kw: getattr(diffusion, loop)(
        GaussianNetwork(0.7, 0.5), clip_denoised=False, cond_fn=classifier, **kw), 1000)
    assert got == pytest.approx((classifier.mean, classifier.std), abs=2e-3)


# ---------------------------------------------------------------- loops

class CallRecorder:
    """A network or classifier that returns zero and records the timesteps and labels of its calls."""

    def __init__(self, factor):
        self.factor, self.timesteps, self.labels = factor, [], []

    def __call__(self, x, t, y):
        assert len(t) == len(x) and len(set(t.tolist())) == 1
        self.timesteps.append(int(t[0]))
        self.labels.append(y)
        return torch.zeros(len(x), x.shape[1] * self.factor, *x.shape[2:])


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_network_and_classifier_get_the_trained_steps(loop):
    diffusion = create_diffusion("7")
    network, classifier, labels = CallRecorder(2), CallRecorder(1), torch.tensor([3, 1, 2])
    getattr(diffusion, loop)(network, SHAPE, cond_fn=classifier, model_kwargs=dict(y=labels), device="cpu")
    assert network.timesteps == classifier.timesteps == [999, 832, 666, 500, 333, 166, 0]
    assert all(y is labels for y in network.labels + classifier.labels)


def test_network_gets_the_trained_steps_outside_the_loops():
    diffusion = create_diffusion("ddim50")
    network, x, kwargs = CallRecorder(2), torch.zeros(SHAPE), dict(y=None)
    diffusion.ddim_reverse_sample(network, x, at(3), model_kwargs=kwargs)
    diffusion.training_losses(network, x, at(4), kwargs)
    diffusion.calc_bpd_loop(network, x, model_kwargs=kwargs)
    assert network.timesteps == [60, 80, *range(980, -1, -20)]


@pytest.mark.parametrize("sampler, kwargs", [("p", dict()), ("ddim", dict(eta=0.0)), ("ddim", dict(eta=1.0))])
def test_loops_start_from_the_noise_and_yield_every_step(sampler, kwargs):
    diffusion = create_diffusion("12", learn_sigma=False)
    network = GaussianNetwork(0.7, 0.5)
    loop, progressive = (getattr(diffusion, f"{sampler}_sample_loop{suffix}") for suffix in ("", "_progressive"))
    noise, fresh = torch.randn(SHAPE), torch.randn(12, *SHAPE)

    def draws():
        rest = iter(fresh)
        return lambda x: next(rest)

    start = noise.clone()
    steps = list(progressive(network, SHAPE, start, noise_fn=draws(), **kwargs))
    assert len(steps) == 12 and torch.equal(start, noise)
    one_step = getattr(diffusion, f"{sampler}_sample")(network, noise, at(11), noise_fn=draws(), **kwargs)
    assert torch.equal(steps[0]["sample"], one_step["sample"])
    assert torch.equal(steps[0]["pred_xstart"], one_step["pred_xstart"])
    for sample in (loop(network, SHAPE, noise, noise_fn=draws(), **kwargs),
                  loop(network, SHAPE, noise, noise_fn=draws(), progress=True, **kwargs)):
        assert torch.equal(sample, steps[-1]["sample"])


class Convolution(torch.nn.Conv2d):
    def forward(self, x, t):
        return super().forward(x)


@pytest.mark.parametrize("loop, kwargs", [("p_sample_loop", dict()), ("ddim_sample_loop", dict(eta=0.0))])
def test_global_generator_is_used_in_the_published_order(loop, kwargs):
    """The initial noise, then one draw a step, even if it adds none: a seed gives the published picture."""
    diffusion = create_diffusion("5", learn_sigma=False)
    network = Convolution(2, 2, 1)
    torch.manual_seed(3)
    got = getattr(diffusion, loop)(network, SHAPE, **kwargs)  # on the network's device by default
    after = torch.rand(())
    torch.manual_seed(3)
    noise, *fresh = (torch.randn(SHAPE) for _ in range(6))
    rest = iter(fresh)
    assert torch.equal(getattr(diffusion, loop)(network, SHAPE, noise, noise_fn=lambda x: next(rest), **kwargs), got)
    assert torch.equal(torch.rand(()), after)


def test_loops_refuse_noise_of_another_shape():
    diffusion = create_diffusion("5")
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(3, 2, 4, 4\)"):
            loop(constant(torch.zeros(1), torch.zeros(1)), SHAPE, torch.zeros(1, 2, 4, 4))


class NoHostData(TorchDispatchMode):
    """Refuses operations on tensors in host memory, and tensors made out of numbers there."""

    def __enter__(self):
        self.tensor, torch.tensor = torch.tensor, self.refuse  # not every release of torch dispatches this one
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    @staticmethod
    def refuse(*args, **kwargs):
        raise AssertionError("torch.tensor takes numbers from the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        touched = [leaf.device.type for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        assert "cpu" not in touched, func
        return func(*args, **(kwargs or {}))


def test_control_host_data_is_refused():
    on_host = torch.ones(1)
    with NoHostData():
        for make in (lambda: torch.tensor([1.0], device="meta"), lambda: on_host * 2, lambda: on_host.to("meta")):
            with pytest.raises(AssertionError):
                make()
    assert torch.tensor(1.0) == 1


@pytest.mark.parametrize("kwargs", [dict(), dict(learn_sigma=False), dict(use_kl=True)])
def test_a_warm_step_needs_nothing_from_the_host(kwargs):
    """Tables are copied to a device once; after that no step copies to it or reads from it ("meta" cannot be read)."""
    diffusion = create_diffusion("10", **kwargs)
    x = torch.empty(SHAPE, device="meta")
    network, gradient = constant(*[x] * (1 if "learn_sigma" in kwargs else 2)), lambda x, t: x

    def all_steps(t):
        for sample in (diffusion.p_sample, diffusion.ddim_sample, diffusion.ddim_reverse_sample):
            sample(network, x, t)
            sample(network, x, t, cond_fn=gradient)
        diffusion.training_losses(network, x, t)
        diffusion.q_mean_variance(x, t)
        diffusion.q_posterior_mean_variance(x, x, t)

    t = torch.zeros(3, dtype=torch.long, device="meta")
    all_steps(t)
    tables = {key: id(table) for key, table in diffusion._device_tables.items()}
    with NoHostData():
        all_steps(t)
        diffusion.p_sample_loop(network, SHAPE, device="meta")
        diffusion.ddim_sample_loop(network, SHAPE, device="meta")
    assert tables == {key: id(table) for key, table in diffusion._device_tables.items()} != {}


def test_arithmetic_is_float32_for_a_network_in_bfloat16():
    """A log variance or a mean with the 8 bits of bfloat16 would be dominated by rounding."""
    diffusion = create_diffusion("")
    x, output = torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4).bfloat16()
    t = torch.tensor([1, 999])
    low, high = (diffusion.p_mean_variance(lambda *_, out=out: out, x, t) for out in (output, output.float()))
    for name in high:
        assert low[name].dtype == torch.float32
        assert torch.allclose(low[name], high[name], rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- losses

def losses(**kwargs):
    """Return loss terms of a random output at steps 0, 1, 500, 999, the output (a leaf), x_0 and the noise."""
    diffusion = create_diffusion("", **kwargs)
    x_0, noise = torch.randn(4, 2, 3, 3).clamp(-1, 1), torch.randn(4, 2, 3, 3)
    output = torch.randn(4, 4, 3, 3).requires_grad_()
    sigma = kwargs.get("learn_sigma", True)
    terms = diffusion.training_losses(lambda x, t: output if sigma else output[:, :2], x_0,
                                      torch.tensor([0, 1, 500, 999]), noise=noise)
    assert {value.shape for value in terms.values()} == {(4,)}
    return terms, output, x_0, noise


def test_loss_is_the_sum_of_its_terms():
    terms, output, _, noise = losses()
    assert set(terms) == {"loss", "mse", "vb"}
    torch.testing.assert_close(terms["mse"], (noise - output[:, :2]).square().mean(dim=(1, 2, 3)))
    assert torch.equal(terms["loss"], terms["mse"] + terms["vb"]) and (terms["vb"].abs() > 1e-6).all()


def test_without_learned_variance_the_loss_is_the_squared_error():
    terms, output, x_0, noise = losses(learn_sigma=False)
    assert set(terms) == {"loss", "mse"} and torch.equal(terms["loss"], terms["mse"])
    torch.testing.assert_close(terms["mse"], (noise - output[:, :2]).square().mean(dim=(1, 2, 3)))
    torch.manual_seed(0)
    terms, output, x_0, noise = losses(learn_sigma=False, predict_xstart=True)
    torch.testing.assert_close(terms["mse"], (x_0 - output[:, :2]).square().mean(dim=(1, 2, 3)))


def test_the_bound_trains_the_variance_alone():
    terms, output, *_ = losses()
    terms["vb"].sum().backward(retain_graph=True)
    assert not output.grad[:, :2].any() and output.grad[:, 2:].abs().amax(dim=(1, 2, 3)).min() > 0
    output.grad = None
    terms["mse"].sum().backward()
    assert output.grad[:, :2].any() and not output.grad[:, 2:].any()


def test_kl_loss_estimates_the_full_bound():
    terms, *_ = losses()
    torch.manual_seed(0)
    kl, output, *_ = losses(use_kl=True)
    assert set(kl) == {"loss"}
    torch.testing.assert_close(kl["loss"], terms["vb"] * 1000)
    kl["loss"].sum().backward()
    assert output.grad[:, :2].any() and output.grad[:, 2:].any()


@pytest.mark.parametrize("respacing, factor", [("", 1.0), ("100", 0.1)])
def test_rescaled_bound_shrinks_with_the_number_of_steps(respacing, factor):
    x_0, noise, eps, values = torch.randn(4, 2, 1, 3, 3)
    plain, rescaled = (create_diffusion(respacing, rescale_learned_sigmas=rescale).training_losses(
        constant(eps, values), x_0, torch.tensor([0, 70]), noise=noise) for rescale in (False, True))
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * factor)
    assert torch.equal(rescaled["mse"], plain["mse"])
    assert torch.equal(rescaled["loss"], rescaled["mse"] + rescaled["vb"])


def test_normal_kl_is_that_of_torch():
    mean1, mean2 = torch.randn(2, 100, dtype=torch.float64)
    log_var1, log_var2 = torch.randn(2, 100, dtype=torch.float64)
    want = kl_divergence(Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, log_var1, mean2, log_var2), want)


def log_bin(x, mean, std):
    """Compute a float64 reference: the tanh form of GELU is x * cdf(x), which gives the cdf without its formula."""
    def cdf(z):
        return torch.nn.functional.gelu(z, approximate="tanh") / z
    lower, upper = (cdf((x + side / 255 - mean) / std) for side in (-1, 1))
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def test_likelihood_is_the_probability_of_a_pixel_bin():
    x = torch.tensor([-1.0, -0.9995, -0.998, -0.5, 0.1, 0.998, 0.9995, 1.0, 3.0], dtype=torch.float64)
    for mean, std in [(0.05, 0.3), (0.9, 0.05), (-0.97, 0.02), (0.3, 2.0)]:
        got = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, math.log(std)))
        torch.testing.assert_close(got, log_bin(x, mean, std), rtol=1e-6, atol=1e-9)
        exact = Normal(mean, std)  # the tanh form is an approximation, good to 4e-4 in each of two cdfs
        inside = x.abs() < 0.999
        want = exact.cdf(x + 1 / 255) - exact.cdf(x - 1 / 255)
        torch.testing.assert_close(got.exp()[inside], want[inside], rtol=0, atol=8e-4)


def test_likelihoods_of_all_pixel_bins_sum_to_1():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in [(0.0, 0.3), (0.95, 0.2), (-2.0, 1.0)]:
        log_p = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, math.log(std)))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("kwargs", [dict(), dict(predict_xstart=True), dict(learn_sigma=False),
                                    dict(learn_sigma=False, sigma_small=True)])
def test_terms_of_the_bound_are_kl_and_likelihood(kwargs):
    """KL of the posterior at t > 0, likelihood of the data at t = 0, in bits, averaged over the dimensions."""
    diffusion = create_diffusion("", use_kl=True, **kwargs)
    x_0, noise = torch.randn(4, 2, 3, 3).clamp(-1, 1), torch.randn(4, 2, 3, 3)
    error, values = torch.randn(2, 4, 2, 3, 3)
    truth, near = (x_0, 0.003) if diffusion.predict_xstart else (noise, 0.3)
    for t in (torch.tensor([0, 1, 500, 999]), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 0, 0])):
        # at t = 0 an error of half a standard deviation: further out, float32 cannot represent a bin's likelihood
        prediction = truth + torch.where((t == 0).view(-1, 1, 1, 1), near, 1.0) * error
        network = constant(prediction, *[values] * kwargs.get("learn_sigma", True))
        x_t = diffusion.q_sample(x_0, t, noise)
        p = diffusion.p_mean_variance(network, x_t, t, clip_denoised=False)
        mean, _, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
        std = (p["log_variance"].double() / 2).exp()
        kl = kl_divergence(Normal(mean.double(), (log_variance.double() / 2).exp()), Normal(p["mean"].double(), std))
        nll = -log_bin(x_0.double(), p["mean"].double(), std)
        want = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean(dim=(1, 2, 3)) / math.log(2)
        got = diffusion.training_losses(network, x_0, t, noise=noise)["loss"] / 1000
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- bits per dimension

def test_bpd_loop_sums_the_terms_of_training_and_the_prior():
    """Column 0 is t = T - 1."""
    # a process that ends far from N(0, I), so that the prior counts
    diffusion = GaussianDiffusion(np.linspace(0.01, 0.06, 20), range(20), 20, predict_xstart=False,
                                  variance="learned_range", loss="mse")
    x_0 = torch.randn(SHAPE).clamp(-1, 1)
    fresh = torch.randn(20, *SHAPE)
    draws = iter(fresh)

    def network(x, t):
        return torch.cat([0.9 * x, 0.2 * x], dim=1)

    bpd = diffusion.calc_bpd_loop(network, x_0, clip_denoised=False, noise_fn=lambda x: next(draws))
    assert {name: tuple(value.shape) for name, value in bpd.items()} == dict(
        total_bpd=(3,), prior_bpd=(3,), vb=(3, 20), xstart_mse=(3, 20), mse=(3, 20))
    for i, t in enumerate(range(19, -1, -1)):
        terms = diffusion.training_losses(network, x_0, at(t), noise=fresh[i])
        torch.testing.assert_close(bpd["vb"][:, i], terms["vb"])
        torch.testing.assert_close(bpd["mse"][:, i], terms["mse"], rtol=1e-3, atol=1e-5)
        # eps and x_0 err in the ratio of the two scales in x_t
        ratio = (1 - diffusion.alphas_cumprod[t]) / diffusion.alphas_cumprod[t]
        torch.testing.assert_close(bpd["xstart_mse"][:, i], terms["mse"] * ratio, rtol=1e-3, atol=1e-5)
    signal = np.prod(1 - diffusion.betas)
    last = Normal(x_0.double() * math.sqrt(signal), math.sqrt(1 - signal))
    prior = kl_divergence(last, Normal(0.0, 1.0)).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(bpd["prior_bpd"].double(), prior, rtol=1e-5, atol=0)
    torch.testing.assert_close(bpd["total_bpd"], bpd["vb"].sum(dim=1) + bpd["prior_bpd"])


def test_bpd_loop_clips_by_default():
    diffusion = create_diffusion("5", predict_xstart=True)
    x_0 = torch.ones(SHAPE)
    network = constant(torch.tensor(3.0), torch.tensor(0.0))
    assert not diffusion.calc_bpd_loop(network, x_0)["xstart_mse"].any()
    assert (diffusion.calc_bpd_loop(network, x_0, clip_denoised=False)["xstart_mse"] == 4.0).all()


@pytest.mark.parametrize("std", [0.2, 0.3])
def test_bound_of_an_optimal_network_is_tight(std):
    """If every reverse step is exact, the bound is -log2 of the probability of each x_0's pixel bin.

    The random noise of the terms leaves a standard error of 0.016 for each x_0.
    """
    diffusion, mean = create_diffusion("50"), 0.1
    network = GaussianNetwork(mean, std, kept=diffusion.timestep_map)
    x_0 = torch.linspace(-0.4, 0.6, 6).view(6, 1, 1, 1).expand(6, 1, 128, 128)
    got = diffusion.calc_bpd_loop(network, x_0, clip_denoised=False)["total_bpd"]
    want = -(Normal(mean, std).log_prob(x_0[:, 0, 0, 0]) + math.log(2 / 255)) / math.log(2)
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)
    assert got.mean().item() == pytest.approx(want.mean().item(), abs=0.03)
