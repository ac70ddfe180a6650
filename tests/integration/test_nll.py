"""Bits per dimension: equal to `calc_bpd_loop` for any batches and ranks, and exact for a known distribution."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.vae import IdentityAutoencoder, load_autoencoder
from common import distributed
from common.errors import UserError
from common.seeding import LIKELIHOOD, seeded_generator
from data.corrupt_images import CorruptImage
from data.dataset import LabeledImageDataset
from data.digits import DigitsDataset
from data.image_folder import ImageFolderDataset
from diffusion import create_diffusion
from evaluation.nll import bits_per_dimension, plot_nll
from sampling.load_model import LoadedModel
from tiny_models import random_model

STEPS = "8"


def digits_model(**config):
    """Return a DiT for the digits with random weights: a new one predicts zero for any input."""
    return random_model(scale=0.1, **dict(input_size=8, patch_size=4, in_channels=1, num_classes=10) | config)


def load_as(model, autoencoder, image_size=8, class_names=None):
    return LoadedModel(model, autoencoder, "some.pt", class_names, "DiT-S/2", image_size, "ema", 1)


class SomeDigits(DigitsDataset):
    """The first of the digits, with other labels, so that mixed-up labels are noticed."""

    def __init__(self, count=5):
        super().__init__()
        self.images, self.paths = self.images[:count], self.paths[:count]
        self.labels = [(7 * index + 3) % 10 for index in range(count)]


@pytest.fixture(scope="module")
def pixels():
    return load_as(digits_model(), IdentityAutoencoder(1)), SomeDigits()


@pytest.fixture(scope="module")
def latents(vae_folder, image_folder):
    model = digits_model(in_channels=4, num_classes=3)
    loaded = load_as(model, load_autoencoder(str(vae_folder)), 32, ["ant", "bee", "cat"])
    return loaded, ImageFolderDataset(image_folder, 32)


def loop_terms(trained, dataset, index, seed=0, steps=STEPS, clip=None, **process):
    """Return the terms by `calc_bpd_loop` of a single image, with its noise; `clip` overrides the clipping."""
    draws = seeded_generator(seed, LIKELIHOOD, index)
    noise_fn = lambda x: torch.randn(x.shape, generator=draws)  # noqa: E731
    x_start, in_pixels = dataset.read(index)[None], trained.autoencoder.name == "none"
    if not in_pixels:
        moments = trained.autoencoder.moments(x_start)
        mean, log_var = moments.chunk(2, dim=1)
        x_start = 0.5 * (mean + (log_var / 2).exp() * noise_fn(mean))
    return create_diffusion(steps, **process).calc_bpd_loop(
        trained.model, x_start, clip_denoised=in_pixels if clip is None else clip, noise_fn=noise_fn,
        model_kwargs=dict(y=torch.tensor([dataset.labels[index]])))


def check(result, terms, rel=1e-5):
    totals = np.array([term["total_bpd"].item() for term in terms])
    assert result["images"] == len(terms)
    assert result["bits_per_dimension"] == pytest.approx(totals.mean(), rel)
    assert result["standard_error"] == pytest.approx(totals.std(ddof=1) / len(totals) ** 0.5, 50 * rel)
    assert result["prior"] == pytest.approx(np.mean([term["prior_bpd"].item() for term in terms]), rel)
    for ours, theirs in (("per_timestep", "vb"), ("mse_per_timestep", "mse")):
        want = torch.stack([term[theirs][0] for term in terms]).mean(0).tolist()[::-1]  # the loop begins at t = T - 1
        assert result[ours] == pytest.approx(want, rel=10 * rel, abs=1e-6)
    assert result["decoder_t0"] == result["per_timestep"][0]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_terms_agree_with_the_loop_for_any_batch_size(pixels, batch_size):
    result = bits_per_dimension(*pixels, batch_size=batch_size, seed=3, respacing=STEPS)
    check(result, [loop_terms(*pixels, index, seed=3) for index in range(5)])
    assert result["space"] == "pixels" and result["dimensions"] == 64
    assert result["model_calls"] == 8 and result["timesteps"] == create_diffusion(STEPS).timestep_map


def test_terms_of_latents_agree_with_the_loop(latents):
    result = bits_per_dimension(*latents, num_images=4, batch_size=3, respacing=STEPS)
    check(result, [loop_terms(*latents, index) for index in (0, 7, 15, 23)])
    assert result["space"] == f"latents of {latents[0].autoencoder.name}" and result["dimensions"] == 4 * 8 * 8
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_predictions_are_clipped_in_pixel_space_only(request, space):
    """The prediction leaves [-1, 1], so that clipping matters in both spaces."""
    trained, dataset = request.getfixturevalue(space)
    clipped, free = (loop_terms(trained, dataset, 0, clip=clip)["vb"][0].flip(0) for clip in (True, False))
    assert (clipped - free).abs().max() > 0.05 * free.abs().max()
    result = bits_per_dimension(trained, dataset, num_images=1, respacing=STEPS)
    want, other = (clipped, free) if space == "pixels" else (free, clipped)
    got = torch.tensor(result["per_timestep"])
    assert torch.allclose(got, want, rtol=1e-4) and not torch.allclose(got, other, rtol=1e-2)
    assert result["standard_error"] is None


def test_every_trained_timestep_is_evaluated_once(pixels):
    trained, dataset = pixels
    calls = []
    def watch(_, inputs, output):
        calls.extend(inputs[1].tolist())
        assert not output.requires_grad

    with trained.model.register_forward_hook(watch):
        result = bits_per_dimension(trained, dataset, num_images=1)
    assert sorted(calls) == list(range(1000)) == result["timesteps"]
    assert result["model_calls"] == len(result["per_timestep"]) == len(result["mse_per_timestep"]) == 1000
    assert result["bits_per_dimension"] == pytest.approx(result["prior"] + sum(result["per_timestep"]), 1e-9)


def test_some_images_are_evenly_spaced(pixels):
    result = bits_per_dimension(*pixels, num_images=3, respacing=STEPS)
    check(result, [loop_terms(*pixels, index) for index in (0, 2, 4)])
    assert bits_per_dimension(*pixels, num_images=50, respacing=STEPS)["images"] == 5


def test_the_bound_is_a_function_of_the_seed(pixels):
    seeds = [bits_per_dimension(*pixels, seed=seed, respacing=STEPS) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1]
    assert abs(seeds[0]["bits_per_dimension"] - seeds[2]["bits_per_dimension"]) > 1e-3


def test_terms_of_a_fixed_variance_agree_with_the_loop(pixels):
    trained = load_as(digits_model(learn_sigma=False), IdentityAutoencoder(1))
    result = bits_per_dimension(trained, pixels[1], respacing=STEPS)
    check(result, [loop_terms(trained, pixels[1], index, learn_sigma=False) for index in range(5)])


def test_classes_are_matched_by_name(latents, image_folder, tmp_path):
    """A validation folder that lacks a class does not shift the labels of the others."""
    trained, _ = latents
    for name in ("bee", "cat"):
        (tmp_path / name).symlink_to(image_folder / name)
    part = ImageFolderDataset(tmp_path, 32)
    want = loop_terms(trained, SimpleNamespace(read=part.read, labels=[1] * 8 + [2] * 8), 0)
    result = bits_per_dimension(trained, part, num_images=1, respacing=STEPS)
    assert result["bits_per_dimension"] == pytest.approx(want["total_bpd"].item(), 1e-5)
    assert abs(loop_terms(trained, part, 0)["total_bpd"].item() - want["total_bpd"].item()) > 1e-3  # label 0


def main():
    """Compute bits on all ranks; `children` runs this."""
    distributed.init()
    trained = load_as(digits_model(), IdentityAutoencoder(1))
    results = [bits_per_dimension(trained, SomeDigits(), count, 2, respacing=STEPS) for count in (5, 1)]
    with open(f"{sys.argv[1]}.{distributed.rank()}", "w") as file:
        json.dump(results, file)
    corrupt = SomeDigits()
    corrupt.read = lambda index: CorruptImage("d/3.png", "cut off") if index == 3 else corrupt.images[index]
    bits_per_dimension(trained, corrupt, respacing=STEPS)


def test_two_ranks_agree_with_one(children, pixels, tmp_path):
    """With parts of different sizes, with an empty part, and with a corrupt image that only one of them reads."""
    text = children.run("test_nll", tmp_path / "out", processes=2, status=2)
    both = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    for result, count in zip(both[0], (5, 1)):
        alone = bits_per_dimension(*pixels, num_images=count, respacing=STEPS)
        assert list(result) == list(alone)
        for name in alone:
            assert result[name] == (alone[name] if alone[name] is None or isinstance(alone[name], str)
                                    else pytest.approx(alone[name], rel=1e-5, abs=1e-6)), name
    assert text.count("rank 1 of 2: cannot read the image d/3.png (cut off)") == 1
    assert text.count("error:") == 1 and "Traceback" not in text


class Normal(LabeledImageDataset):
    """Images of independent 8-bit pixels, from a normal distribution rounded to the 256 values."""

    channels, image_size, class_names, mean, std = 1, 8, ["all"], 0.1, 0.25
    values = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1

    def __init__(self, count):
        edges = (self.values[1:] + self.values[:-1]) / 2
        below = 0.5 * (1 + torch.erf((edges - self.mean) / (self.std * math.sqrt(2))))
        self.probability = torch.cat([torch.zeros(1), below, torch.ones(1)]).diff()
        drawn = torch.multinomial(self.probability, count * 64, replacement=True, generator=seeded_generator(0))
        self.images = self.values[drawn].float().view(count, 1, 8, 8)
        self.labels, self.paths = [0] * count, ["normal"] * count
        self.bits = -self.probability[drawn].log2().mean().item()  # of these images, by the true distribution

    def read(self, index):
        return self.images[index]


class BestPrediction(torch.nn.Module):
    """The network that knows the distribution of `Normal`: posterior mean, and with a learned variance the exact one.

    For x_0 ~ N(m, s^2) and x_t = a x_0 + b eps all conditionals are normal, also of a respaced process:
    E[eps | x_t] = b (x_t - a m) / (a^2 s^2 + b^2), and Var[x_0 | x_t] = s^2 b^2 / (a^2 s^2 + b^2), so that
    p(x_{t-1} | x_t) has the variance btilde + coef1^2 Var[x_0 | x_t].

    `error` is a factor on the predicted noise; 1 is exact.
    """

    def __init__(self, respacing, learn_sigma=True, error=1.0):
        super().__init__()
        self.diffusion = create_diffusion(respacing, learn_sigma=learn_sigma)
        self.learn_sigma, self.error = learn_sigma, error
        self.sample_shape, self.config, self.device = (1, 8, 8), SimpleNamespace(num_classes=1), torch.device("cpu")
        self.a2 = self.diffusion.alphas_cumprod
        self.b2, s2 = 1 - self.a2, Normal.std**2
        self.total = self.a2 * s2 + self.b2  # Var[x_t]
        self.variance = (self.diffusion.posterior_variance
                         + self.diffusion.posterior_mean_coef1**2 * s2 * self.b2 / self.total)

    def forward(self, x, t, y):
        step, diffusion = self.diffusion.timestep_map.index(int(t[0])), self.diffusion
        eps = self.b2[step]**0.5 * (x - self.a2[step]**0.5 * Normal.mean) / self.total[step] * self.error
        if not self.learn_sigma:
            return eps
        low, high = diffusion.posterior_log_variance_clipped[step], diffusion.log_betas[step]
        v = (math.log(self.variance[step]) - low) / (high - low)
        return torch.cat([eps, torch.full_like(eps, 2 * v - 1)], dim=1)


def bits_of_normal(data, **model):
    model = BestPrediction("20", **model)
    return model, bits_per_dimension(load_as(model, IdentityAutoencoder(1)), data, batch_size=len(data), respacing="20")


def test_the_best_model_reaches_the_entropy():
    data = Normal(2000)
    model, best = bits_of_normal(data)
    entropy = -(data.probability * data.probability.log2()).sum().item()
    assert 7.0 < entropy < 7.1 and data.bits == pytest.approx(entropy, abs=0.01)
    assert best["bits_per_dimension"] == pytest.approx(data.bits, abs=0.01)  # 0.003 is its standard deviation
    prior = 0.5 * (model.a2[-1] * (Normal.std**2 + Normal.mean**2) - model.a2[-1] - math.log(model.b2[-1]))
    assert best["prior"] == pytest.approx(prior / math.log(2), rel=0.05)
    kl = 0.5 * np.log2(model.variance[1:] / model.diffusion.posterior_variance[1:])
    assert np.allclose(best["per_timestep"][1:], kl, rtol=0.05, atol=1e-6)
    assert np.allclose(best["mse_per_timestep"], model.a2 * Normal.std**2 / model.total, rtol=0.05)
    for change in (dict(learn_sigma=False), dict(error=0.9)):
        _, worse = bits_of_normal(data, **change)
        assert worse["bits_per_dimension"] > data.bits + 0.03, change


@pytest.mark.parametrize("damaged", [True, False])
def test_a_corrupt_image_is_named(pixels, damaged):
    data = SomeDigits()
    data.read = lambda index: CorruptImage("d/3.png", "cut off", damaged) if index == 3 else data.images[index]
    with pytest.raises(UserError, match=r"d/3\.png"):
        bits_per_dimension(pixels[0], data, batch_size=2, respacing=STEPS)
    assert bits_per_dimension(pixels[0], data, num_images=3, respacing=STEPS)["images"] == 3  # 0, 2, 4


@pytest.mark.parametrize("change, problem", [
    (dict(respacing="2000"), r"--respacing 2000: "),
    (dict(image_size=16), r"16 pixels"),
    (dict(autoencoder=IdentityAutoencoder(3)), r"3 channels"),
    (dict(class_names=["0", "1"]), r"class '2'"),
    (dict(model=digits_model(num_classes=9)), r"10 classes"),
])
def test_data_that_does_not_fit_is_refused(change, problem):
    respacing = change.pop("respacing", STEPS)
    trained = load_as(**dict(model=digits_model(), autoencoder=IdentityAutoencoder(1)) | change)
    with pytest.raises(UserError, match=problem):
        bits_per_dimension(trained, SomeDigits(), respacing=respacing)


def test_a_bound_that_is_not_finite_is_refused():
    model = digits_model()
    torch.nn.init.constant_(model.final_layer.linear.bias, math.nan)
    with pytest.raises(UserError, match="load_digits/0 is nan"):
        bits_per_dimension(load_as(model, IdentityAutoencoder(1)), SomeDigits(), respacing=STEPS)


def test_plot_leaves_out_terms_below_zero(pixels, tmp_path):
    result = bits_per_dimension(*pixels, respacing=STEPS)
    def drawn(name, **change):
        plot_nll(result | change, tmp_path / "plots" / name)
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.format == "PNG" and picture.width == 1800
            return np.asarray(picture.convert("L"))

    whole = drawn("whole.png")
    assert whole.max() == 255 and (whole < 64).mean() > 0.001
    below, absent = (drawn("odd.png", per_timestep=[*result["per_timestep"][:-1], value], prior=-1e-9)
                     for value in (-1e-9, math.nan))
    assert np.array_equal(below, absent) and not np.array_equal(below, whole)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["odd.png", "whole.png"]


def test_a_plot_that_cannot_be_written_leaves_no_file(pixels, tmp_path):
    result = bits_per_dimension(*pixels, num_images=1, respacing=STEPS)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write \S+folder\.png"):
        plot_nll(result, tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
