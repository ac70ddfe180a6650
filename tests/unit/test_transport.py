"""Transport: paths, losses and times; samplers are in test_transport_samplers.py."""
import pytest
import torch

from tiny_models import ExactGaussian
from transport import DIFFUSION_FORMS, LOSS_WEIGHTS, PATHS, PREDICTIONS, Sampler, TimeSampler, create_transport


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path_type", PATHS)
def test_derivatives_and_conversions_of_a_path(path_type):
    path = PATHS[path_type]()
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    for values, slope, index in ((alpha, d_alpha, 0), (sigma, d_sigma, 1)):
        step = 1e-6
        difference = (path.coefficients(t + step)[index] - path.coefficients(t - step)[index]) / (2 * step)
        torch.testing.assert_close(difference, slope, rtol=1e-6, atol=1e-7)
        assert ((values > 0) & (values < 1)).all()
    x, score = draw(7, 2, 3).double(), draw(7, 2, 3, seed=1).double()
    torch.testing.assert_close(path.score_from_velocity(x, t, path.velocity_from_score(x, t, score)), score)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_field_has_the_smallest_loss(path_type, prediction):
    """Its gradient is zero: a multiple of the exact prediction, a little larger or smaller, is no better."""
    transport = create_transport(path_type, prediction)
    exact = ExactGaussian(transport, mean=0.7, std=0.5)
    x, noise, t = 0.7 + 0.5 * draw(20000, 2), draw(20000, 2, seed=1), torch.rand(20000) * 0.8 + 0.1
    losses = [transport.training_losses(lambda x, t, f=factor: f * exact(x, t), x, t=t, noise=noise)["loss"].mean()
              for factor in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2])


def test_time_and_noise_are_drawn_or_given():
    transport, model, x = create_transport(), lambda x, t: x * t.view(-1, 1), draw(6, 3)
    torch.manual_seed(3)
    drawn = transport.training_losses(model, x)
    torch.manual_seed(3)
    noise, t = torch.randn_like(x), torch.rand(6)
    given = transport.training_losses(model, x, t=t, noise=noise)
    assert all(torch.equal(drawn[name], given[name]) for name in ("loss", "pred"))
    assert drawn["loss"].shape == (6,) and drawn["pred"].shape == x.shape
    with pytest.raises(ValueError, match="noise"):
        transport.training_losses(model, x, noise=noise[:2])


@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_weights_make_a_noise_loss_one_of_score_or_velocity(weight):
    """SiT, section 2.4: with them, the errors of the velocity, or the score times w = g, are counted."""
    transport = create_transport("GVP", "noise", weight)
    x, noise, t = draw(5, 3), draw(5, 3, seed=1), torch.linspace(0.1, 0.9, 5)
    loss = transport.training_losses(lambda x, t: torch.zeros_like(x), x, t=t, noise=noise)["loss"]
    _, g = transport.path.drift_coefficients(t)
    sigma = transport.path.coefficients(t)[1]
    factor = {None: torch.ones(5), "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}[weight]
    torch.testing.assert_close(loss, factor * noise.square().mean(dim=1))


def test_the_half_of_the_variance_is_dropped():
    transport, x, t = create_transport(), draw(3, 4, 2, 2), torch.rand(3)
    plain = transport.training_losses(lambda x, t: x.sin(), x, t=t, noise=x)
    with_variance = transport.training_losses(lambda x, t: torch.cat([x.sin(), x.cos()], dim=1), x, t=t, noise=x)
    assert torch.equal(plain["loss"], with_variance["loss"]) and with_variance["pred"].shape == x.shape
    with pytest.raises(ValueError, match="channels"):
        transport.training_losses(lambda x, t: x[:, :3], x)


def test_time_scale_multiplies_what_the_model_is_given():
    seen, x = [], draw(4, 2)
    model = lambda x, t: (seen.append(t), x)[1]  # noqa: E731
    for scale in (1.0, 1000.0):
        transport = create_transport(time_scale=scale)
        transport.training_losses(model, x, t=torch.full((4,), 0.25))
        Sampler(transport).sample_ode(sampling_method="euler", num_steps=3)(x, model)
    assert [float(t[0]) for t in seen] == [0.25, 0.0, 0.5, 250.0, 0.0, 500.0]


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_keep_away_from_singular_ends(path_type, prediction, shift):
    """Nothing infinite at the ends, with any weight and shift."""
    for weight in LOSS_WEIGHTS:
        transport = create_transport(path_type, prediction, weight, time_shift=shift)
        t = transport.training_times(torch.tensor([0.0, 0.5, 1.0]))
        assert (t.diff() > 0).all() and 0 <= t[0] <= 1.001e-3 and 0.999 - 1e-6 <= t[-1] <= 1
        loss = transport.training_losses(lambda x, t: x, draw(3, 4), t=t, noise=draw(3, 4, seed=1))["loss"]
        assert torch.isfinite(loss).all()


def test_shift_moves_times_towards_the_noise():
    """s l / (1 + (s - 1) l) of the noise level l = 1 - t, alike in training and sampling."""
    transport, level = create_transport(time_shift=3.0), torch.linspace(0, 1, 11)
    expected = 3 * level / (1 + 2 * level)
    torch.testing.assert_close(1 - transport.training_times(1 - level), expected)
    seen = []
    Sampler(transport).sample_ode(sampling_method="euler", num_steps=11)(
        draw(1, 2), lambda x, t: (seen.append(float(t)), x)[1])
    torch.testing.assert_close(1 - torch.tensor(seen), expected.flip(0)[:10])


def test_time_samplers():
    transport = create_transport("VP", time_shift=1.0)
    for distribution, quartile in (("uniform", 0.25), ("logit-normal", 0.3375)):  # 1 / (1 + exp(0.6745))
        sampler = TimeSampler(transport, distribution)
        t, weights = sampler.sample(20000, "cpu", torch.Generator().manual_seed(0))
        assert torch.equal(t, sampler.sample(20000, "cpu", torch.Generator().manual_seed(0))[0])
        assert t.shape == (20000,) and t.dtype == torch.float32 and (weights == 1).all()
        assert abs(t.quantile(0.25) - quartile) < 0.01 and abs(t.median() - 0.5) < 0.01
        assert sampler.state_dict() == {}
    with pytest.raises(ValueError, match="distribution"):
        TimeSampler(transport, "cosine")


@pytest.mark.parametrize("argument, value", [
    ("path_type", "linear"), ("prediction", "x"), ("loss_weight", "none"), ("train_eps", -0.1), ("sample_eps", 0.5),
    ("time_shift", 0.0), ("time_scale", -1.0), ("time_shift", float("nan")),
])
def test_unknown_names_and_numbers_out_of_range(argument, value):
    with pytest.raises(ValueError, match=argument):
        create_transport(**{argument: value})


def test_diffusion_forms_are_never_negative():
    t = torch.linspace(0.01, 0.99, 50)
    for path_type in PATHS:
        for form in DIFFUSION_FORMS:
            coefficient = PATHS[path_type]().diffusion(t, form, norm=0.5)
            assert coefficient.shape == t.shape and (coefficient >= 0).all() and torch.isfinite(coefficient).all()
    assert (PATHS["VP"]().diffusion(t, "constant", norm=0.5) == 0.5).all()
    with pytest.raises(ValueError, match="diffusion_form"):
        PATHS["VP"]().diffusion(t, "cosine")
