"""From conditions and noise to images: noise, guidance, samplers, pictures."""
import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.vae import IdentityAutoencoder
from common.errors import UserError
from data.image_io import make_image_grid, save_image_grid, to_uint8
from diffusion import create_diffusion
from helpers import raises_argument
from sampling.noise import GlobalRNG, PerSampleRNG
from sampling.pipeline import SamplingPipeline, build_pipeline, sample_preview
from sampling.trajectory import TrajectoryRecorder
from tiny_models import random_model

LABELS = torch.tensor([3, 0, 4])
COND = dict(y=LABELS)


def tiny_model(channels=4, **config):
    return random_model(scale=0.1, **dict(in_channels=channels, num_classes=5) | config)


def build(model=None, steps=5, cfg_scale=1.0, **arguments):
    model = model or tiny_model()
    return build_pipeline(model, IdentityAutoencoder(model.in_channels), steps, cfg_scale, **arguments)


@pytest.mark.parametrize("value, expected", [
    (-1, 0), (0, 128), (1, 255), (-1.01, 0), (1.5, 255), (-40, 0), (0.5, 191), (-0.5, 64), (0.007, 128),
    (0.0079, 129), (-0.001, 127), (0.99, 254)])
def test_uint8_is_127_5_x_plus_128_truncated(value, expected):
    pixels = to_uint8(torch.full((1, 3, 1, 1), float(value)))
    assert pixels.dtype == torch.uint8 and pixels.flatten().tolist() == [expected] * 3


def test_uint8_images_have_channels_last_and_three_of_them():
    images = torch.rand(2, 3, 4, 5) * 2 - 1
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert torch.equal(pixels[1, 2, 3], to_uint8(images[1:, :, 2:3, 3:4]).flatten())
    gray = to_uint8(images[:, :1])
    assert gray.shape == (2, 4, 5, 3)
    assert all(torch.equal(gray[..., channel], pixels[..., 0]) for channel in range(3))


def draws(noise, n, steps=3):
    x = noise.initial((n, 2, 3, 3))
    return torch.stack([x, *(noise.step(x).clone() for _ in range(steps))])


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = draws(PerSampleRNG(7, range(6), "cpu"), 6)
    assert torch.equal(draws(PerSampleRNG(7, [3, 4], "cpu"), 2), together[:, 3:5])
    assert torch.equal(draws(PerSampleRNG(7, np.array([5, 0]), "cpu"), 2), together[:, [5, 0]])


def test_noise_is_standard_normal_and_differs_between_samples_steps_and_seeds():
    together = torch.cat([draws(PerSampleRNG(seed, range(6), "cpu"), 6, steps=20) for seed in (7, 8)])
    assert len({tuple(row.tolist()) for row in together.flatten(0, 1).flatten(1)}) == 2 * 6 * 21
    assert abs(together.mean()) < 5 / together.numel() ** 0.5
    assert abs(together.std() - 1) < 5 / (2 * together.numel()) ** 0.5


def test_global_noise_is_drawn_in_the_published_order():
    """x_T of N, then at each step a draw for the doubled batch, of which the first half counts."""
    noise = draws(GlobalRNG(11, "cpu"), 3)
    torch.manual_seed(11)
    expected = [torch.randn(3, 2, 3, 3), *(torch.randn(6, 2, 3, 3)[:3] for _ in range(3))]
    assert torch.equal(noise, torch.stack(expected))


def test_scale_1_computes_the_conditional_half_only():
    """The noise is that of the published doubled batch."""
    pipeline, rows = build(), []
    pipeline.model.x_embedder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    images = pipeline(COND, GlobalRNG(1, "cpu"))
    assert rows == [3] * 5
    torch.manual_seed(1)
    z = torch.randn(3, 4, 4, 4)
    expected = create_diffusion("5").p_sample_loop(pipeline.model, z.shape, z, clip_denoised=False,
                                                   model_kwargs=dict(y=LABELS),
                                                   noise_fn=lambda x: torch.randn(6, 4, 4, 4)[:3])
    assert torch.equal(images, expected)
    assert images.std() > 0.1


def published(model, cfg_scale, seed, labels=LABELS, **arguments):
    """Sample as the published code does: a doubled batch, all of it sampled, the first half kept."""
    torch.manual_seed(seed)
    z = torch.randn(len(labels), model.in_channels, 4, 4)
    z, y = torch.cat([z, z]), torch.cat([labels, torch.full_like(labels, 5)])
    kwargs = dict(y=y, cfg_scale=cfg_scale) | arguments
    samples = create_diffusion("5").p_sample_loop(model.forward_with_cfg, z.shape, z, clip_denoised=False,
                                                  model_kwargs=kwargs, device="cpu")
    return samples.chunk(2)[0]


@pytest.mark.parametrize("cfg_scale", [1.5, 4.0])
def test_a_seed_gives_the_published_picture(cfg_scale):
    pipeline, rows = build(cfg_scale=cfg_scale), []
    pipeline.model.x_embedder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    images = pipeline(COND, GlobalRNG(1, "cpu"))
    assert rows == [6] * 5
    torch.testing.assert_close(images, published(pipeline.model, cfg_scale, seed=1), rtol=1e-6, atol=1e-6)
    assert (images - build(pipeline.model)(COND, GlobalRNG(1, "cpu"))).abs().max() > 1e-3


def test_three_of_four_channels_are_guided_by_default():
    model = tiny_model()
    images = {channels: build(model, cfg_scale=4, cfg_channels=channels)(COND, GlobalRNG(1, "cpu"))
              for channels in (None, 3, "all", 4)}
    assert torch.equal(images[None], images[3]) and torch.equal(images["all"], images[4])
    assert (images[3] - images[4]).abs().max() > 1e-3
    torch.testing.assert_close(images[4], published(model, 4.0, seed=1, cfg_channels=4), rtol=1e-6, atol=1e-6)
    assert build(tiny_model(1), cfg_scale=4).cfg_channels == 1
    assert build(tiny_model(16), cfg_scale=4).cfg_channels == 16


@pytest.mark.parametrize("interval, guided", [
    (None, 5), ((0, 999), 5), ((200, 600), 2), ((250, 250), 1), ((1, 2), 0), ((0, 0), 1), ((999, 999), 1)])
def test_guidance_is_limited_to_the_interval(interval, guided):
    model, sizes = tiny_model(), []  # the timesteps of five steps: 0, 250, 500, 749, 999
    model.register_forward_pre_hook(lambda module, inputs: sizes.append((len(inputs[0]), int(inputs[1][0]))))
    pipeline = build(model, cfg_scale=4.0, cfg_interval=interval)
    images = pipeline(COND, GlobalRNG(1, "cpu"))
    assert [t for _, t in sizes] == list(reversed(pipeline.diffusion.timestep_map))
    low, high = interval or (0, 999)
    assert [size for size, _ in sizes] == [6 if low <= t <= high else 3 for _, t in sizes]
    assert pipeline.metadata()["model_calls"] == 5 + guided and pipeline.metadata().get("cfg_interval") == (
        None if interval is None else list(interval))
    everywhere, nowhere = (build(model, cfg_scale=scale)(COND, GlobalRNG(1, "cpu")) for scale in (4.0, 1.0))
    assert torch.equal(images, everywhere) == (guided == 5)
    torch.testing.assert_close(images, nowhere) if guided == 0 else None
    assert guided == 0 or not torch.equal(images, nowhere)


def test_samples_do_not_depend_on_their_batch():
    pipeline = build(cfg_scale=2.0)
    together = pipeline(COND, PerSampleRNG(5, range(3), "cpu"))
    alone = pipeline(dict(y=LABELS[1:2]), PerSampleRNG(5, [1], "cpu"))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps, sampler, expected", [
    (5, None, "ddpm"), ("2,3", None, "ddpm"), ("ddim5", None, "ddim"), (5, "ddim", "ddim"),
    ("ddim5", "ddpm", "ddpm")])
def test_sampler_follows_from_the_steps_unless_it_is_named(steps, sampler, expected):
    pipeline = build(steps=steps, sampler=sampler)
    assert pipeline.sampler == expected
    assert pipeline.diffusion.timestep_map == create_diffusion(str(steps)).timestep_map


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_draws_its_noise_from_the_argument(eta):
    pipeline = build(steps="ddim5", eta=eta)
    images = pipeline(COND, GlobalRNG(1, "cpu"))
    torch.manual_seed(1)
    z = torch.randn(3, 4, 4, 4)
    expected = create_diffusion("ddim5").ddim_sample_loop(
        pipeline.model, z.shape, z, clip_denoised=False, eta=eta, model_kwargs=dict(y=LABELS),
        noise_fn=lambda x: torch.randn(6, 4, 4, 4)[:3])
    assert torch.equal(images, expected)


@pytest.mark.parametrize("name, value, arguments", [
    ("cfg_scale", 0.5, dict(cfg_scale=0.5)),
    ("cfg_scale", 4.0, dict(cfg_scale=4.0, model=tiny_model(class_dropout_prob=0))),
    ("cfg_channels", 5, dict(cfg_scale=4.0, cfg_channels=5)),
    ("cfg_interval", (300, 200), dict(cfg_scale=4.0, cfg_interval=(300, 200))),
    ("num_sampling_steps", 1001, dict(steps=1001)),
    ("num_sampling_steps", "ddim300", dict(steps="ddim300")),
    ("num_sampling_steps", "ddim", dict(steps="ddim")),
    ("eta", 0.5, dict(eta=0.5)),
])
def test_an_argument_that_does_not_fit_is_named(name, value, arguments):
    with raises_argument(**{name: value}):
        build(**arguments)


class Doubling(IdentityAutoencoder):
    def decode(self, latents):
        return 2 * latents


def test_steps_are_shown_and_the_last_is_decoded():
    pipeline, shown = build(cfg_scale=2.0), []
    pipeline.autoencoder = Doubling(4)
    noise = PerSampleRNG(5, range(3), "cpu")
    images = pipeline(COND, noise, on_step=lambda step, x: shown.append((step, x.clone())))
    assert [step for step, _ in shown] == [-1, 0, 1, 2, 3, 4]
    assert torch.equal(shown[0][1], PerSampleRNG(5, range(3), "cpu").initial((3, 4, 4, 4)))
    assert torch.equal(images, 2 * shown[-1][1])
    assert not images.requires_grad


def test_previews_show_up_to_ten_classes_a_row_each_with_the_same_noise():
    for num_classes, rows in ((3, 3), (25, 10)):
        model = tiny_model(num_classes=num_classes)
        names = [str(label) for label in range(num_classes)]
        images, columns = sample_preview(model, IdentityAutoencoder(4), names, columns=2)
        assert images.shape == (2 * rows, 4, 4, 4) and columns == 2
        assert torch.equal(images, sample_preview(model, IdentityAutoencoder(4), names, columns=2)[0])


def test_latents_need_not_be_square():
    model = tiny_model(input_size=(4, 6))
    pipeline = SamplingPipeline(model, IdentityAutoencoder(4), create_diffusion("2"))
    assert pipeline(COND, GlobalRNG(0, "cpu")).shape == (3, 4, 4, 6)


def test_a_grid_clips_values_and_enlarges_tiny_images():
    tiny = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).repeat(3, 1, 1, 1)
    tiny[1] = -7
    grid = make_image_grid(tiny, columns=2)
    assert grid.shape == (3, 2 * 66 + 2, 2 * 66 + 2)
    assert grid.min() == 0 and grid.max() == 1
    tile = grid[:, 2:66, 2:66]
    torch.testing.assert_close(tile[:, ::8, ::8], (tiny[0].expand(3, 8, 8) + 1) / 2)
    assert torch.equal(tile[:, ::8, ::8], tile[:, 7::8, 7::8])
    assert (grid[:, 2:66, 68:132] == 0).all()
    assert make_image_grid(torch.zeros(2, 3, 100, 100), columns=2).shape == (3, 104, 206)


def test_a_grid_is_saved_as_a_picture(tmp_path):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    save_image_grid(images, 2, str(tmp_path / "grid.png"))
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.array(picture)
    assert pixels.shape == (68, 134, 3)
    np.testing.assert_allclose(pixels[2:66, 2:66], (images[0].permute(1, 2, 0) + 1) * 127.5, atol=1)
    for path in (tmp_path / "missing" / "grid.png", tmp_path / "grid.nothing"):
        with pytest.raises(UserError, match=str(path)):
            save_image_grid(images, 2, str(path))


@pytest.mark.parametrize("steps", [1, 5, 50, 75, 120, 1000])
def test_a_trajectory_keeps_evenly_spaced_steps(steps):
    trajectory = TrajectoryRecorder(steps)
    for step in range(-1, steps):
        trajectory(step, step)
    count = min(50, steps) + 1
    assert len(trajectory.latents) == count
    assert (trajectory.latents[0], trajectory.latents[-1]) == (-1, steps - 1)
    gaps = np.diff(trajectory.latents)
    assert gaps.min() >= steps // (count - 1) and gaps.max() <= -(-steps // (count - 1)) + 1


def test_a_trajectory_is_saved_as_an_animation(tmp_path):
    trajectory, x = TrajectoryRecorder(6), torch.rand(7, 3, 3, 4, 4) - 0.5
    for step in range(-1, 6):
        trajectory(step, x[step + 1])
    trajectory.save(Doubling(3), 2, str(tmp_path / "way.gif"))
    with Image.open(tmp_path / "way.gif") as gif:
        assert (gif.n_frames, gif.size) == (7, (134, 134))
        durations = []
        for frame in range(7):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        last = np.array(gif.convert("RGB"))
    assert durations[-1] > 1000 > 100 > max(durations[:-1])
    expected = make_image_grid(2 * x[-1], 2).permute(1, 2, 0).numpy() * 255
    assert abs(last - expected).mean() < 10  # of 255; a GIF has 256 colors
    with pytest.raises(UserError, match=str(tmp_path / "missing")):
        trajectory.save(Doubling(3), 2, str(tmp_path / "missing" / "way.gif"))
