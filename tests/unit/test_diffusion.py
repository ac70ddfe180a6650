"""The diffusion process: its published interface, forward process, reverse step and losses, against closed forms."""
import inspect
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from tiny_models import column, constant, every_step

BETAS = np.linspace(1e-4, 0.02, 1000)  # DDPM, section 4
ALPHA_BAR = np.cumprod(1.0 - BETAS)
SHAPE = (3, 2, 4, 4)


def at(t, n=SHAPE[0]):
    return torch.full((n,), t)


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


def test_q_sample_is_the_closed_form():
    diffusion = create_diffusion("")
    t, x_0, noise = every_step(diffusion)
    want = column(np.sqrt(ALPHA_BAR)) * x_0 + column(np.sqrt(1 - ALPHA_BAR)) * noise
    torch.testing.assert_close(diffusion.q_sample(x_0, t, noise), want.float(), rtol=1e-5, atol=1e-6)


def test_q_mean_variance_describes_q_sample():
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
