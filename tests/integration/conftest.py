"""Fixtures of several files: making latent caches, and scoring sets of images."""

import pytest
from PIL import Image

import data.latent_cache.manifest
from common.errors import UserError
from data.latent_cache.writer import LatentCacheWriter
from helpers import picture, write_images


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
