"""Samplers and the bound on data with a known answer.

If x_0 ~ N(m, s^2) in each dimension, then x_t is Gaussian too, and so are the samples: `GaussianNetwork` is optimal.
"""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion import GaussianDiffusion, create_diffusion
from tiny_models import column, constant, every_step

ALPHA_BAR = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # DDPM, section 4
SHAPE = (3, 2, 4, 4)


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


def fixed(noise):
    return lambda x: noise


def at(t, n=SHAPE[0]):
    return torch.full((n,), t)


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


def test_noise_of_another_shape_and_reversed_noisy_steps_are_refused():
    diffusion = create_diffusion("5")
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(3, 2, 4, 4\)"):
            loop(constant(torch.zeros(1), torch.zeros(1)), SHAPE, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"eta.*0\.5"):
        diffusion.ddim_reverse_sample(constant(torch.tensor(0.0)), torch.zeros(SHAPE), at(0), eta=0.5)


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
