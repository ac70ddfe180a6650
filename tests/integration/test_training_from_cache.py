"""train.py --features-path: the run from the images, up to the rounding of what is stored."""
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.vae import VAE, CachedLatents
from data.image_folder import ImageFolderDataset
from helpers import TINY, call
from run_files import picture, stored, write_images
from training.train_step import TrainStep

FLAGS = ["--num-classes", 3, *TINY, "--global-batch-size", 8, "--log-every", 1, "--num-workers", 0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """45 images in three classes, five steps an epoch; the latents of the VAE below are about of size 1."""
    files = {f"{'abc'[i % 3]}/{i:02d}.png": Image.fromarray(picture(40, 36 + i, 3, seed=i)) for i in range(45)}
    return write_images(tmp_path_factory.mktemp("images"), files)


@pytest.fixture(scope="module")
def vae(vae_folder, tmp_path_factory):
    """A VAE whose latents have about the size that diffusion expects, and whose posterior is wide."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.1)
    folder = tmp_path_factory.mktemp("wide") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def cache(request, images, vae, tmp_path_factory):
    """(dtype, folder) of a cache of them."""
    folder = tmp_path_factory.mktemp(request.param) / "cache"
    make_cache(images, vae, folder, "--dtype", request.param)
    return request.param, folder


def make_cache(images, vae, folder, *flags):
    call("extract_features", "--data-path", images, "--features-path", folder, "--image-size", 32, "--vae", vae,
         "--num-workers", 0, "--batch-size", 6, *flags)


@pytest.fixture
def record(command, monkeypatch, tmp_path):
    """Run train.py in this process; what it saw: latents (steps, 8, 4, 8, 8), labels (steps, 8), losses (steps,)."""
    def run(*flags, results="results"):
        seen = []
        train_step = TrainStep.__call__

        def noted(self, step, batch, cond):
            losses, grad_norm, is_applied = train_step(self, step, batch, cond)
            seen.append((Noted.last, cond["y"], losses["loss"].item()))
            return losses, grad_norm, is_applied

        class Noted:
            last = None

        def noting(encode):
            def encode_and_note(self, batch, noise):
                Noted.last = encode(self, batch, noise)
                return Noted.last
            return encode_and_note

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", noted)
            for autoencoder in (VAE, CachedLatents):
                patch.setattr(autoencoder, "encode", noting(autoencoder.encode))
            status, out, err = command("train", *flags, *FLAGS, "--results-dir", tmp_path / results)
        assert status == 0, err
        seen_latents, labels, losses = zip(*seen)
        return torch.stack(seen_latents), torch.stack(labels), np.array(losses), out
    return run


def test_cached_training_sees_what_training_from_images_sees(record, images, vae, cache):
    dtype, folder = cache
    want = record("--data-path", images, "--image-size", 32, "--vae", vae, "--max-steps", 17, results="images")
    got = record("--features-path", folder, "--max-steps", 17, results="cache")
    tolerance = {"fp32": 2**-20, "fp16": 2**-10, "bf16": 2**-7}[dtype]
    assert want[0].std() > 0.5 and want[0].shape == (17, 8, 4, 8, 8)
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=2 * tolerance)
    assert torch.equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=tolerance)
    if dtype != "fp32":
        assert not torch.equal(got[0], want[0])  # the control: something was rounded
    other = record("--features-path", folder, "--max-steps", 17, "--global-seed", 1, results="other")
    assert abs(other[2] - want[2]).max() > 10 * tolerance * want[2].mean()


def test_every_epoch_draws_new_flips_and_samples(record, cache):
    seen = record("--features-path", cache[1], "--max-steps", 10)[0]
    first, second = seen[:5].flatten(0, 1), seen[5:].flatten(0, 1)
    distances = (first[:, None] - second[None]).flatten(2).abs().mean(dim=2)
    assert distances.min() > 0.05


def test_cache_on_the_device_gives_the_same_run(record, cache):
    want = record("--features-path", cache[1], "--max-steps", 7, results="files")
    got = record("--features-path", cache[1], "--max-steps", 7, "--features-in-memory", results="memory")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and (got[2] == want[2]).all()


def test_corrupt_images_are_replaced_alike(record, images, vae, tmp_path):
    shutil.copytree(images, tmp_path / "spoilt")
    names = ImageFolderDataset(images, 32).paths
    for index in (3, 4, 44):
        (tmp_path / "spoilt" / names[index]).write_bytes(b"")
    make_cache(tmp_path / "spoilt", vae, tmp_path / "cache", "--dtype", "fp32", "--max-bad-images", 3)
    want = record("--data-path", tmp_path / "spoilt", "--image-size", 32, "--vae", vae, "--max-steps", 6,
                  "--max-bad-images", 3, results="images")
    got = record("--features-path", tmp_path / "cache", "--max-steps", 6, results="cache")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], want[1])
    listed = (tmp_path / "images" / "000-DiT-S-2" / "bad_images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} <= {str(tmp_path / "spoilt" / names[i]) for i in (3, 4, 44)}
    assert 0 < len(listed) == want[3].count("WARNING: skipped the image")


def test_checkpoint_of_a_cached_run_knows_its_vae(run_ok, cache, vae, images, tmp_path, monkeypatch):
    run_ok("train", "--features-path", cache[1], *FLAGS, "--max-steps", 1, "--sample-every", 1,
           "--results-dir", tmp_path)
    (grid,) = tmp_path.glob("*/samples/0000001.png")
    assert Image.open(grid).size[0] > 128
    checkpoint = stored(tmp_path, 1)
    assert checkpoint["args"]["vae"] == str(vae) and checkpoint["args"]["image_size"] == 32
    assert checkpoint["config"]["class_names"] == ["a", "b", "c"] and checkpoint["config"]["image_channels"] == 3
    monkeypatch.chdir(tmp_path)
    out = run_ok("sample", "--ckpt", next(tmp_path.glob("*/checkpoints/*.pt")), "--num-sampling-steps", 2)
    assert f"VAE {vae}" in out
    assert Image.open("sample.png").size[0] > 32


@pytest.mark.parametrize("flags, sentence", [
    (["--image-size", "64"], "--image-size 64: the cache {cache} is of images of 32 pixels"),
    (["--vae", "none"], "--vae none: the cache {cache} was made with {vae}"),
    (["--num-classes", "2"], "--num-classes 2: {cache} has 3 classes"),
    (["--global-batch-size", "100"], "--global-batch-size 100: {cache} has 45 images"),
    (["--data-path", "digits"], "--data-path: not allowed with argument --features-path"),
])
def test_flags_that_contradict_the_cache_are_refused(run_error, cache, vae, tmp_path, flags, sentence):
    err = run_error("train", "--features-path", cache[1], *FLAGS, *flags, "--results-dir", tmp_path / "results")
    assert sentence.format(cache=cache[1], vae=vae) in err
    assert not (tmp_path / "results").exists()


def test_flips_need_mirror_images_in_the_cache(run_ok, run_error, images, vae, tmp_path):
    make_cache(images, vae, tmp_path / "cache", "--no-flip")
    flags = ["--features-path", tmp_path / "cache", *FLAGS, "--max-steps", 1, "--results-dir", tmp_path / "results"]
    assert "made without mirror images" in run_error("train", *flags, "--flip")
    assert "flip=False" in run_ok("train", *flags)


@pytest.mark.parametrize("scale, shift, warning", [
    (2.0, 0.1, None),
    (0.02, 0.1, "standard deviation of .* scaling_factor 0.02"),
    (2.0, 9.0, "mean of .* shift_factor 9"),
])
def test_wrong_scale_or_shift_gives_a_warning_at_the_start(record, images, vae, tmp_path, scale, shift, warning):
    from diffusers import AutoencoderKL
    model = AutoencoderKL.from_pretrained(vae)
    model.register_to_config(scaling_factor=scale, shift_factor=shift)
    model.save_pretrained(tmp_path / "vae")
    make_cache(images, tmp_path / "vae", tmp_path / "cache")
    from_images = record("--data-path", images, "--image-size", 32, "--vae", tmp_path / "vae", "--max-steps", 1)[3]
    from_cache = record("--features-path", tmp_path / "cache", "--max-steps", 1)[3]
    assert "Round trip of 8 images" in from_images and "does not restore these images" in from_images
    for out in (from_images, from_cache):
        assert "(4, 8, 8) each, mean" in out
        found = re.findall(r"WARNING: the latents of .*", out)
        assert (found == []) if warning is None else (len(found) == 1 and re.search(warning, found[0]))
