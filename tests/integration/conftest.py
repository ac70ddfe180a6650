"""Fixtures of several files: making latent caches, and scoring sets of images."""
import json

import numpy as np
import pytest
from PIL import Image

import data.latent_cache.manifest
from common.errors import UserError
from data.latent_cache.writer import LatentCacheWriter
from helpers import DIGITS, call
from run_files import checkpoint_path, images_of, picture, write_images


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """13 images in three classes."""
    files = {f"{'abc'[i % 3]}/{i:02d}.png": Image.fromarray(picture(40 + i, 36, 3, seed=i)) for i in range(13)}
    return write_images(tmp_path_factory.mktemp("few"), files)


@pytest.fixture
def extract(run_ok, run_error, vae_folder):
    """Run extract_features.py in this process and return its output, or its error if it must end with one."""
    def run(images, folder, *flags, fails=False):
        return (run_error if fails else run_ok)(
            "extract_features", "--data-path", images, "--features-path", folder, "--image-size", 32, "--vae",
            vae_folder, "--num-workers", 0, "--batch-size", 4, *flags)
    return run


@pytest.fixture
def cache(extract, few_images, tmp_path):
    """Folder of a cache of `few_images`."""
    extract(few_images, tmp_path / "complete")
    return tmp_path / "complete"


@pytest.fixture
def small_files(monkeypatch):
    """Let a file of a cache hold five images (8x8x8 fp16 in two orientations), so that a small cache has several."""
    monkeypatch.setattr(data.latent_cache.manifest, "MAX_FILE_BYTES", 5 * 2 * 8 * 8 * 8 * 2 + 17)


@pytest.fixture
def extract_until(extract, monkeypatch):
    """extract_until(count, images, folder): extract, and fail when the batch of image `count` is to be written."""
    write = LatentCacheWriter.write

    def run(count, images, folder):
        def write_or_stop(self, first, *rest):
            if first >= count:
                raise UserError("stopped")
            return write(self, first, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(LatentCacheWriter, "write", write_or_stop)
            assert "stopped" in extract(images, folder, fails=True)
    return run


@pytest.fixture
def other_vae(vae_folder, tmp_path):
    """Make a copy of the VAE with one weight of its encoder or decoder changed, or another configuration."""
    def make(part="encoder", **config):
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained(vae_folder)
        if not config:
            next(getattr(vae, part).parameters()).data.flatten()[0] += 1
        vae.register_to_config(**config)
        vae.save_pretrained(tmp_path / "other-vae")
        return tmp_path / "other-vae"
    return make


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Two .npz of 71 and 72 images of 4 x 4 pixels."""
    paths = [str(tmp_path_factory.mktemp("sets") / name) for name in ("one.npz", "two.npz")]
    for seed, path in enumerate(paths, start=1):
        np.savez(path, arr_0=images_of(70 + seed, seed), arr_1=np.zeros(70 + seed, dtype=np.int64))
    return paths


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of a tiny DiT after 20 steps on the digits."""
    results = tmp_path_factory.mktemp("trained")
    call("train", *DIGITS, "--max-steps", 20, "--lr", 0.01, "--ema-decay", 0.5, "--results-dir", results)
    return str(checkpoint_path(results, 20))


@pytest.fixture
def score(run_ok, run_error, tmp_path):
    """score(*flags) -> the record of `evaluate.py score`, and its output; score(..., fails=True) -> the error."""
    def run(*flags, fails=False):
        flags = ["evaluate", "score", *flags, "--output", tmp_path / "record.json"]
        if fails:
            return run_error(*flags)
        out = run_ok(*flags)
        return json.loads((tmp_path / "record.json").read_text()), out
    return run
