"""extract_features.py: what it stores, and the same bytes for any number of processes and restarts."""
import json
import random
import shutil
import time
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from autoencoder.vae import VAE, load_autoencoder
from data.image_folder import ImageFolderDataset
from data.latent_cache.manifest import ENCODED, new_manifest
from data.latent_cache.reader import LatentCache, verify
from data.latent_cache.writer import LatentCacheWriter
from helpers import ROOT, AtCall, wait_for
from run_files import picture, read_files, write_images

# A run halts at its sixth batch, so that it does not end before it is killed, however long that takes.
HALT = AtCall("data.latent_cache.writer.LatentCacheWriter.write", 6, partial(time.sleep, 600))
ITEMS = [(i, False) for i in range(13)]


@pytest.fixture(scope="module")
def moments(few_images, vae_folder):
    """The moments of each image and of its mirror image from the VAE itself, shape (13, 2, 8, 8, 8)."""
    data, autoencoder = ImageFolderDataset(few_images, 32), load_autoencoder(str(vae_folder))
    pixels = torch.stack([data.read(i) for i in range(len(data))])
    return torch.stack([autoencoder.moments(pixels), autoencoder.moments(pixels.flip(-1))], dim=1)


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_moments_are_those_of_both_orientations(extract, few_images, moments, tmp_path, small_files, dtype, tolerance):
    extract(few_images, tmp_path / "cache", "--dtype", dtype)
    cache, data = LatentCache(str(tmp_path / "cache")), ImageFolderDataset(few_images, 32)
    assert len(cache) == 13 and len(cache.layout.names) >= 3
    keys = [(i, flip) for i in (12, 0, 4, 5, 9, 10, 7) for flip in (True, False)]
    got, cond, corrupt = cache.__getitems__(keys)
    assert got.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype] and corrupt == []
    assert cond["y"].tolist() == [data.labels[i] for i, _ in keys] and cond["y"].dtype == torch.int64
    for row, (i, flip) in zip(got, keys):
        torch.testing.assert_close(row.float(), moments[i, int(flip)], rtol=tolerance, atol=1e-5)
    assert (moments[:, 0].flip(-1) - moments[:, 1]).abs().max() > 0.01  # mirrored latents would be something else
    assert (cache.class_names, cache.flips, cache.channels, cache.image_size) == (["a", "b", "c"], True, 3, 32)
    paths = (tmp_path / "cache" / "paths.txt").read_text().splitlines()
    assert paths == list(data.paths) and paths[0] == "a/00.png"


def test_no_flip_halves_the_cache(extract, few_images, cache, tmp_path):
    extract(few_images, tmp_path / "one", "--no-flip")
    both, one = LatentCache(str(cache)), LatentCache(str(tmp_path / "one"))
    assert torch.equal(both.__getitems__(ITEMS).images, one.__getitems__(ITEMS).images)
    assert one.layout.row_bytes * 2 == both.layout.row_bytes and not one.flips


def test_manifest_describes_the_cache(extract, few_images, vae_folder, tmp_path):
    out = extract(few_images, tmp_path / "cache")
    assert "13 images and their mirror images, 8x8x8 fp16 each: 0.03 MB" in out and "PSNR" in out
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest.items() >= dict(
        complete=True, vae=str(vae_folder), vae_sha256=load_autoencoder(str(vae_folder)).encoder_sha256,
        space=dict(channels=4, stride=4, scale=0.5, shift=0.0, image_channels=3), image_size=32, count=13,
        classes=["a", "b", "c"], dtype="fp16", data_path=few_images).items()
    assert "center" in manifest["crop"]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix != ".json"}
    assert {name: stated["bytes"] for name, stated in manifest["files"].items()} == sizes


def test_vae_of_one_channel_encodes_digits(run_ok, tmp_path):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=3,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(tmp_path / "vae")
    run_ok("extract_features", "--data-path", "digits", "--image-size", 8, "--vae", tmp_path / "vae", "--features-path",
           tmp_path / "cache", "--num-workers", 0, "--batch-size", 500)
    cache = LatentCache(str(tmp_path / "cache"))
    assert len(cache) == 1438 and not cache.flips and cache.channels == 1
    assert cache.__getitems__([(7, False)]).images.shape == (1, 6, 4, 4)


def test_bfloat16_encoder_is_close_to_float32(extract, few_images, moments, tmp_path):
    extract(few_images, tmp_path / "cache", "--precision", "bf16", "--dtype", "fp32")
    difference = LatentCache(str(tmp_path / "cache")).__getitems__(ITEMS).images - moments[:, 0]
    assert 1e-4 < difference.abs().max() < 0.05 * moments.abs().max()


def code_in_docs(word):
    """Return the first Python block of docs/latents.md in which a word occurs."""
    text = (ROOT / "docs" / "latents.md").read_text()
    return next(block for block in text.split("```python\n")[1:] if word in block).split("```")[0]


def test_code_in_the_docs_reads_the_cache(extract, few_images, vae_folder, tmp_path, small_files, monkeypatch):
    extract(few_images, tmp_path / "latents")
    monkeypatch.chdir(tmp_path)
    for i, flip in ((11, 1), (4, 0)):
        names = dict(i=i, flip=flip)
        np.random.seed(0)
        exec(code_in_docs("np.load"), names)
        np.random.seed(0)
        noise = torch.tensor(np.random.randn(4, 8, 8)[None])
        moments = LatentCache("latents").__getitems__([(i, bool(flip))]).images
        want = load_autoencoder(str(vae_folder)).latent_scaling.draw(moments, noise)[0]
        np.testing.assert_allclose(names["latent"], want, rtol=1e-5, atol=1e-6)
        assert names["latent"].dtype == np.float32


def test_code_in_the_docs_draws_latents(extract, few_images, moments, tmp_path, monkeypatch):
    extract(few_images, tmp_path / "latents", "--dtype", "fp32")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_in_docs("load_cached_latents"), names)
    mean = moments[[0, 7], [0, 1]].chunk(2, dim=1)[0]
    torch.testing.assert_close(names["latents"], 0.5 * mean, rtol=1e-5, atol=1e-5)
    assert names["cond"]["y"].tolist() == ImageFolderDataset(few_images, 32).labels[[0, 7]].tolist()


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """2,000 images in five classes."""
    files = {f"class-{i % 5}/{i:04d}.png": Image.fromarray(picture(6, 7, 3, seed=i)).resize((33 + i % 30, 32 + i % 17))
             for i in range(2000)}
    return write_images(tmp_path_factory.mktemp("many"), files)


@pytest.fixture(scope="module")
def whole_cache(session_children, many_images, vae_folder, tmp_path_factory):
    """A cache of `many_images` that one process made undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    session_children.run("extract_features", *flags_for(many_images, vae_folder, folder))
    return folder


def flags_for(images, vae, folder):
    return ["--data-path", images, "--features-path", folder, "--image-size", 32, "--vae", vae, "--num-workers", 1]


def count_encoded(folder):
    path = folder / "progress.npy"
    return int((np.fromfile(path, dtype=np.uint8)[128:] == ENCODED).sum()) if path.exists() else 0


def test_two_processes_write_the_bytes_of_one(children, many_images, vae_folder, whole_cache, tmp_path):
    out = children.run("extract_features", *flags_for(many_images, vae_folder, tmp_path / "cache"), processes=2)
    assert out.count("is complete: 2,000 images") == 1 and len(LatentCache(str(whole_cache))) == 2000
    assert read_files(tmp_path / "cache") == read_files(whole_cache)


def test_ten_kills_leave_no_trace(children, many_images, vae_folder, whole_cache, tmp_path):
    """SIGKILL at random moments, from the start of the program on: the bytes are those of an undisturbed run."""
    flags = flags_for(many_images, vae_folder, tmp_path / "cache")
    chance, seen = random.Random(0), [0]
    for kill in range(10):
        workers = int(kill == 5)  # once: a worker that lost its master takes five seconds to see it
        children.kill_during("extract_features", *flags, "--num-workers", workers, prepare=HALT,
                             when=lambda _: count_encoded(tmp_path / "cache") > seen[-1], delay=chance.random() * 0.1)
        seen.append(count_encoded(tmp_path / "cache"))
    assert seen == sorted(seen) and 0 < seen[1] < seen[-1] < 2000
    children.run("extract_features", *flags)
    assert read_files(tmp_path / "cache") == read_files(whole_cache)


def test_missing_data_is_reported_once_by_two_processes(children, vae_folder, tmp_path):
    out = children.run("extract_features", *flags_for(tmp_path / "none", vae_folder, tmp_path / "cache"), processes=2,
                       status=2)
    assert out.count("there is no such folder") == 1


def test_second_extraction_is_refused_while_one_runs(children, extract, many_images, vae_folder, tmp_path):
    (child,) = children.start("extract_features", *flags_for(many_images, vae_folder, tmp_path / "cache"))
    wait_for(lambda: count_encoded(tmp_path / "cache") > 0)
    psutil.Process(child.pid).suspend()  # so that it cannot end before the second has started
    err = extract(many_images, tmp_path / "cache", "--batch-size", 32, fails=True)
    assert "another extraction is writing to it" in err
    psutil.Process(child.pid).resume()
    children.join([child])
    assert verify(str(tmp_path / "cache")) == []


def test_restart_needs_disk_for_the_rest_alone(many_images, vae_folder, whole_cache, tmp_path):
    shutil.copytree(whole_cache, tmp_path / "cache")
    data, autoencoder = ImageFolderDataset(many_images, 32), load_autoencoder(str(vae_folder))
    writer = LatentCacheWriter(str(tmp_path / "cache"), new_manifest(data, "", autoencoder, 32, True, "fp16", "tf32"))
    assert writer.count_bytes_left() < 10_000
    empty = LatentCacheWriter(str(tmp_path / "empty"), writer.manifest)
    assert empty.count_bytes_left() == 4_096_128
    empty.prepare(data)
    assert empty.count_bytes_left() > 4_000_000  # the files have their length, and take nothing yet


def test_nothing_is_encoded_twice(extract, extract_until, few_images, tmp_path, monkeypatch):
    extract(few_images, tmp_path / "whole")
    extract_until(8, few_images, tmp_path / "cache")
    passes, moments = [], VAE.moments
    monkeypatch.setattr(VAE, "moments", lambda self, images: (passes.append(len(images)), moments(self, images))[1])
    assert "8 images are there already" in extract(few_images, tmp_path / "cache")
    assert passes == [*[1] * 8, 4, 4, 1, 1]  # a look at eight images; the batches 8 .. 11 and 12, in two orientations
    assert read_files(tmp_path / "cache") == read_files(tmp_path / "whole")
    passes.clear()
    assert "is complete: 13 images" in extract(few_images, tmp_path / "cache") and passes == []


def test_resuming_with_another_batch_size_keeps_what_is_done(extract, extract_until, few_images, cache, tmp_path):
    """As after running out of memory: what is there is kept, ranges fill the gaps."""
    extract_until(4, few_images, tmp_path / "resumed")
    extract(few_images, tmp_path / "resumed", "--batch-size", 3)
    resumed, whole = (LatentCache(str(folder)).__getitems__([(i, True) for i in range(13)]).images
                      for folder in (tmp_path / "resumed", cache))
    torch.testing.assert_close(resumed, whole, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("flags, here, there", [
    (["--image-size", "16"], "--image-size 16:", "image_size 32"), (["--dtype", "fp32"], "--dtype fp32:", "dtype fp16"),
    (["--no-flip"], "--flip False:", "orientations 2"),
    (["--precision", "bf16"], "--precision bf16:", "precision tf32"),
])
def test_folder_of_another_cache_is_refused_and_unchanged(extract, few_images, cache, flags, here, there):
    before = read_files(cache)
    err = extract(few_images, cache, *flags, fails=True)
    assert here in err and f"another cache, of {there}" in err
    assert read_files(cache) == before


def test_other_images_or_vaes_are_refused(extract, few_images, image_folder, vae_folder, other_vae, cache, tmp_path):
    err = extract(image_folder, cache, fails=True)
    assert "--data-path" in err and "another cache" in err
    shutil.copytree(few_images, tmp_path / "moved")
    extract(tmp_path / "moved", cache)  # the same images in another place
    (tmp_path / "moved" / "a" / "03.png").rename(tmp_path / "moved" / "a" / "04.png")
    assert "of 13 other images" in extract(tmp_path / "moved", cache, fails=True)
    scaled = other_vae(scaling_factor=0.25)
    err = extract(few_images, cache, "--vae", scaled, fails=True)
    assert f"--vae {scaled}: " in err and "'scale': 0.5" in err
    other = other_vae()
    err = extract(few_images, cache, "--vae", other, fails=True)
    assert str(vae_folder) in err and str(other) in err
