"""Samplers of a transport against the exact solution for normal data."""
import math
import sys

import pytest
import torch

from models import SiT_models
from tiny_models import ExactGaussian, random_weights
from transport import DIFFUSION_FORMS, LAST_STEPS, PATHS, PREDICTIONS, SDE_METHODS, Sampler, create_transport

MEAN, STD = 0.7, 0.5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_flow(model, x, t0, t1):
    """Map x along the probability flow: for normal data it scales the distance to the mean."""
    (mean_0, std_0), (mean_1, std_1) = (model.marginal(torch.tensor(t, dtype=torch.float64)) for t in (t0, t1))
    return mean_1 + std_1 / std_0 * (x - mean_0)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_ode_reaches_the_exact_solution(path_type, prediction, reverse):
    transport = create_transport(path_type, prediction)
    model, z = ExactGaussian(transport, MEAN, STD), draw(5, 2, 3)
    interval = transport.ode_interval(reverse)
    trace = Sampler(transport).sample_ode(sampling_method="heun", num_steps=201, reverse=reverse)(z, model)
    assert trace.shape == (201, 5, 2, 3) and torch.equal(trace[0], z)
    torch.testing.assert_close(trace[-1], exact_flow(model, z, *interval), rtol=0, atol=5e-3)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_the_ode_methods(method, order):
    """On GVP; on straight lines to normal data midpoint happens to be of order three."""
    transport = create_transport("GVP")
    model, z = ExactGaussian(transport, MEAN, STD), draw(5, 2)
    exact = exact_flow(model, z, 0.0, 1.0)
    errors = [(Sampler(transport).sample_ode(sampling_method=method, num_steps=n + 1)(z, model)[-1] - exact).norm()
              for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_adaptive_method_holds_its_tolerance():
    pytest.importorskip("torchdiffeq")
    transport = create_transport()
    model, z, calls = ExactGaussian(transport, MEAN, STD), draw(5, 2), []
    solve = Sampler(transport).sample_ode(sampling_method="dopri5", num_steps=2, rtol=1e-6, atol=1e-8)
    trace = solve(z, lambda x, t: (calls.append(t), model(x, t))[1])
    torch.testing.assert_close(trace[-1], exact_flow(model, z, 0.0, 1.0), rtol=1e-5, atol=1e-6)
    assert trace.shape == (2, 5, 2) and 7 < len(calls) < 500
    with pytest.raises(ValueError, match="dopri6"):
        Sampler(transport).sample_ode(sampling_method="dopri6")(z, model)


def test_without_torchdiffeq_there_are_methods_of_fixed_steps(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    transport = create_transport()
    model, z = ExactGaussian(transport, MEAN, STD), draw(3, 2)
    assert torch.isfinite(Sampler(transport).sample_ode(sampling_method="heun")(z, model)).all()
    with pytest.raises(ModuleNotFoundError, match="pip install torchdiffeq") as error:
        Sampler(transport).sample_ode()(z, model)
    assert error.value.name == "torchdiffeq"


def moments_of_sde(transport, seed=0, **options):
    """Return mean and standard deviation of SDE samples, and the number of samples in the trace."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4000, 2, generator=generator)
    trace = Sampler(transport).sample_sde(**options)(
        z, ExactGaussian(transport, MEAN, STD), noise_fn=lambda x: torch.randn(x.shape, generator=generator))
    return trace[-1].mean().item(), trace[-1].std().item(), len(trace)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_sde_has_the_distribution_of_the_data(path_type, form):
    """With every diffusion form, also "constant", and SBDM, which is infinite at the noise."""
    mean, std, count = moments_of_sde(create_transport(path_type), diffusion_form=form, num_steps=250,
                                      last_step_size=0.01)
    assert mean == pytest.approx(MEAN, abs=0.04) and std == pytest.approx(STD, abs=0.05) and count == 250


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sde_methods_and_last_steps(method, last_step, prediction):
    """Tweedie's step gives the expected data, whose spread is a little smaller."""
    mean, std, count = moments_of_sde(create_transport("Linear", prediction), sampling_method=method, num_steps=100,
                                      diffusion_form="sigma", last_step=last_step, last_step_size=0.02)
    assert mean == pytest.approx(MEAN, abs=0.04) and std == pytest.approx(STD, abs=0.05) and count == 100


def test_sde_noise_is_drawn_by_the_caller_or_globally():
    transport = create_transport()
    model, z = ExactGaussian(transport, MEAN, STD), draw(4, 2).float()
    sample = Sampler(transport).sample_sde(num_steps=5, diffusion_form="sigma")
    torch.manual_seed(1)
    globally = sample(z, model)[-1]
    torch.manual_seed(1)
    drawn = []
    by_caller = sample(z, model, noise_fn=lambda x: (drawn.append(1), torch.randn(x.shape))[1])[-1]
    assert torch.equal(globally, by_caller) and len(drawn) == 4  # the last step adds none


@pytest.mark.parametrize("option, value", [
    ("sampling_method", "euler"), ("diffusion_form", "cosine"), ("last_step", "mean"), ("last_step_size", 0.0),
    ("num_steps", 1),
])
def test_sde_options_that_cannot_be(option, value):
    with pytest.raises(ValueError, match=option):
        Sampler(create_transport()).sample_sde(**{option: value})


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_likelihood_of_normal_data_is_exact(path_type, prediction):
    """The field has a diagonal Jacobian, for which Hutchinson's estimate has no variance."""
    transport = create_transport(path_type, prediction, sample_eps=1e-4)
    model, x = ExactGaussian(transport, MEAN, STD), MEAN + STD * draw(5, 2, 3)
    logp, z = Sampler(transport).sample_ode_likelihood(sampling_method="midpoint", num_steps=251)(x, model)
    exact = torch.distributions.Normal(MEAN, STD).log_prob(x).flatten(1).sum(dim=1)
    torch.testing.assert_close(logp, exact, rtol=0, atol=0.03)  # VP starts from noise with a little data
    assert z.shape == x.shape and not logp.requires_grad


def test_likelihood_is_unbiased_for_correlated_data():
    """x = A n with n standard normal: the mean over many probes is the exact value, single probes differ."""
    transport = create_transport()
    mix = torch.tensor([[0.8, 0.5], [0.0, 0.4]], dtype=torch.float64)
    covariance, eye = mix @ mix.T, torch.eye(2, dtype=torch.float64)

    def velocity(x, t):
        marginal = t[0] ** 2 * covariance + (1 - t[0]) ** 2 * eye
        return x @ torch.linalg.solve(marginal, t[0] * covariance - (1 - t[0]) * eye)  # they commute

    x = (mix @ torch.tensor([0.6, -1.1], dtype=torch.float64)).expand(4000, 2)
    probe = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    logp, _ = Sampler(transport).sample_ode_likelihood(sampling_method="heun", num_steps=101)(x, velocity, probe=probe)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x[0])
    assert logp.std() > 0.1 and logp.mean() == pytest.approx(exact.item(), abs=0.02)


def test_a_script_written_for_sit_runs():
    """Names, signatures and guidance as SiT's sample.py uses them; a variance in the output changes nothing."""
    model = SiT_models["SiT-S/2"](input_size=4, num_classes=7, depth=1, hidden_size=16, num_heads=2, learn_sigma=True)
    random_weights(model.eval())
    transport = create_transport("Linear", "velocity", None, None, None)
    labels = torch.tensor([1, 5])
    z = torch.randn(2, 4, 4, 4)
    z, y = torch.cat([z, z]), torch.cat([labels, torch.full((2,), 7)])
    sample_fn = Sampler(transport).sample_ode(sampling_method="euler", num_steps=4, atol=1e-6, rtol=1e-3, reverse=False)
    with torch.no_grad():
        samples = sample_fn(z, model.forward_with_cfg, y=y, cfg_scale=1.5)[-1]
        expected = z
        for t in torch.linspace(0, 1, 4)[:3]:
            out = model(torch.cat([expected[:2], expected[:2]]), t.expand(4), y)[:, :4]
            guided = out[2:, :3] + 1.5 * (out[:2, :3] - out[2:, :3])
            expected = expected + torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1) / 3
        assert samples.chunk(2)[0].shape == (2, 4, 4, 4)
        torch.testing.assert_close(samples[:2], expected[:2])
        trace = Sampler(transport).sample_sde(sampling_method="Euler", diffusion_form="sigma", diffusion_norm=1.0,
                                              last_step="Mean", last_step_size=0.04, num_steps=5)(
            z, model.forward_with_cfg, y=y, cfg_scale=1.5)
    assert len(trace) == 5 and torch.isfinite(trace[-1]).all()
