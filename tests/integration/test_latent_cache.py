"""The latent cache on disk: faults while it is written, corrupt images, damage, and reading it."""
import errno
import os
import pickle
import random
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from autoencoder.vae import VAE, LatentScaling, load_autoencoder, load_cached_latents
from common.errors import ArgumentError, UserError
from common.files import sha256_file
from data.image_folder import ImageFolderDataset
from data.latent_cache.manifest import CORRUPT, ENCODED, MISSING, new_manifest, read_manifest, write_manifest
from data.latent_cache.reader import LatentCache, verify
from data.latent_cache.writer import LatentCacheWriter
from helpers import raises_argument
from run_files import read_files, write_images


def test_too_small_disk_is_refused_before_writing(extract, few_images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    err = extract(few_images, tmp_path / "cache", fails=True)
    assert "0.03 MB are needed" in err and "0.02 MB free" in err
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk_is_an_error_and_the_run_resumes(extract, few_images, cache, tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []
    def full(file, data, offset):
        calls.append(len(data))
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    err = extract(few_images, tmp_path / "cut", fails=True)
    assert "cannot write the images 8 .. 11 ([Errno 28] No space left on device)" in err
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "8 images are there already" in extract(few_images, tmp_path / "cut")
    assert read_files(tmp_path / "cut") == read_files(cache)


def test_short_writes_are_continued(extract, few_images, cache, tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    extract(few_images, tmp_path / "short")
    assert read_files(tmp_path / "short") == read_files(cache)


def test_links_are_not_written_through(extract, extract_until, few_images, tmp_path):
    moments, outside = tmp_path / "cache" / "moments-000.npy", tmp_path / "outside.npy"
    extract_until(4, few_images, tmp_path / "cache")
    moments.rename(outside)
    moments.symlink_to(outside)
    before = outside.read_bytes()
    assert "is missing or was changed" in extract(few_images, tmp_path / "cache", fails=True)
    (tmp_path / "cache" / "progress.npy").unlink()
    extract(few_images, tmp_path / "cache")
    assert outside.read_bytes() == before and not moments.is_symlink()


def test_folders_that_are_not_a_cache_are_not_written_to(extract, few_images, cache, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (cache / "manifest.json").unlink()
    for folder in (tmp_path / "mine", cache):
        before = read_files(folder)
        assert "the folder is not empty, and has no manifest.json" in extract(few_images, folder, fails=True)
        assert read_files(folder) == before
    shutil.copytree(few_images, tmp_path / "images")
    for inside in (tmp_path / "images", tmp_path / "images" / "latents"):
        assert "lies in --data-path" in extract(tmp_path / "images", inside, fails=True)
    (tmp_path / "killed").mkdir()  # as a kill leaves it before anything was written
    for name in ("extraction.lock", "manifest.json.77.tmp"):
        (tmp_path / "killed" / name).touch()
    extract(few_images, tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == ["labels.npy", "manifest.json", "moments-000.npy", "paths.txt"]


def test_damaged_complete_cache_is_refused(extract, few_images, cache):
    (cache / "moments-000.npy").unlink()
    assert "moments-000.npy is missing" in extract(few_images, cache, fails=True)


def test_file_names_with_a_line_break_are_refused(extract, few_images, tmp_path):
    shutil.copytree(few_images, tmp_path / "images")
    (tmp_path / "images" / "a" / "00.png").rename(tmp_path / "images" / "a" / "0\n0.png")
    assert "has a line break in it" in extract(tmp_path / "images", tmp_path / "cache", fails=True)
    assert os.listdir(tmp_path / "cache") == []


def test_out_of_memory_names_the_batch_size(extract, few_images, tmp_path, monkeypatch):
    def full(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("no")
        return torch.zeros(1, 8, 8, 8)

    monkeypatch.setattr(VAE, "moments", full)
    assert "--batch-size 4: does not fit into the memory of cpu" in extract(few_images, tmp_path / "cache", fails=True)


def test_non_finite_latents_are_refused(extract, few_images, tmp_path, monkeypatch):
    moments = VAE.moments
    monkeypatch.setattr(VAE, "moments", lambda self, images: moments(self, images) / 0)
    err = extract(few_images, tmp_path / "cache", fails=True)
    assert "--vae" in err and "non-finite" in err


def test_unwritable_folder_is_an_error(extract, few_images, tmp_path):
    (tmp_path / "file").touch()
    err = extract(few_images, tmp_path / "file" / "cache", fails=True)
    assert f"--features-path {tmp_path}/file/cache: cannot be written to" in err


def test_changed_files_of_an_incomplete_cache_are_refused(extract, extract_until, few_images, cache, tmp_path):
    """What was encoded before is not looked at again: a file that went missing meanwhile must not come back empty."""
    extract_until(4, few_images, tmp_path / "cut")
    for name in ("moments-000.npy", "progress.npy"):
        path = tmp_path / "cut" / name
        raw = path.read_bytes()
        for spoilt in (raw[:-1], b"\0" * 10 + raw[10:], None):
            path.unlink()
            if spoilt is not None:
                path.write_bytes(spoilt)
            elif name == "progress.npy":
                break  # without it nothing counts as done
            assert f"{name} is missing or was changed" in extract(few_images, tmp_path / "cut", fails=True)
            path.write_bytes(raw)
    extract(few_images, tmp_path / "cut")
    assert read_files(tmp_path / "cut") == read_files(cache)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_values_beyond_the_dtype_are_refused(few_images, vae_folder, tmp_path, dtype):
    """float16 ends at 65504."""
    data, autoencoder = ImageFolderDataset(few_images, 32), load_autoencoder(str(vae_folder))
    writer = LatentCacheWriter(str(tmp_path / "cache"), new_manifest(data, "", autoencoder, 32, True, dtype, "fp32"))
    writer.prepare(data)
    moments = torch.full((3, 2, 8, 8, 8), 70000.0)
    with raises_argument(r"images 2 \.\. 4, up to 7e\+04", dtype="fp16") if dtype == "fp16" else nullcontext():
        writer.write(2, moments, [False] * 3)
    assert (writer.progress() == MISSING).sum() == (13 if dtype == "fp16" else 10)


@pytest.fixture
def spoilt_images(few_images, tmp_path):
    """The 13 images, of which the second, the third and the last (in the data set's order) are none."""
    shutil.copytree(few_images, tmp_path / "spoilt")
    paths = ImageFolderDataset(few_images, 32).paths
    for index in (1, 2, 12):
        path = tmp_path / "spoilt" / paths[index]
        path.write_bytes(path.read_bytes()[:200] if index > 1 else b"")
    return tmp_path / "spoilt"


def test_first_corrupt_image_stops_the_run_by_default(extract, spoilt_images, tmp_path):
    err = extract(spoilt_images, tmp_path / "cache", fails=True)
    assert f"cannot read the image {spoilt_images}/a/03.png" in err and "--max-bad-images" in err
    assert not (np.load(tmp_path / "cache" / "progress.npy") == ENCODED).any()


def test_allowed_corrupt_images_are_left_out_and_listed(extract, spoilt_images, tmp_path):
    err = extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 2, fails=True)
    assert "c/11.png" in err and "--max-bad-images 2: cannot read" in err and "number 3 in all" in err
    progress = np.load(tmp_path / "cache" / "progress.npy").tolist()
    assert progress == [ENCODED, CORRUPT, CORRUPT, *[ENCODED] * 9, CORRUPT]
    out = extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 3)
    assert "10 images are there already" in out and "3 of 3 corrupt images that --max-bad-images allows" in out
    for again in (out, extract(spoilt_images, tmp_path / "cache")):
        assert "is complete: 13 images, 3 of them corrupt" in again
    for index in (1, 2, 12):
        assert not np.load(tmp_path / "cache" / "moments-000.npy")[index].any()  # zeros, as the docs say
    manifest = read_manifest(str(tmp_path / "cache"))
    assert manifest["bad_images"] == [[1, "a/03.png"], [2, "a/06.png"], [12, "c/11.png"]]


def test_corrupt_images_are_tried_again_by_the_next_run(extract, few_images, spoilt_images, cache, tmp_path):
    extract(spoilt_images, tmp_path / "cut", "--max-bad-images", 2, fails=True)
    assert "cannot read the image" in extract(spoilt_images, tmp_path / "cut", fails=True)
    shutil.copytree(few_images, spoilt_images, dirs_exist_ok=True)
    assert "is complete: 13 images. " in extract(spoilt_images, tmp_path / "cut")
    assert read_manifest(str(tmp_path / "cut"))["bad_images"] == []
    repaired, intact = (LatentCache(str(folder)).__getitems__([(i, True) for i in range(13)]).images
                        for folder in (tmp_path / "cut", cache))
    torch.testing.assert_close(repaired, intact, rtol=2**-10, atol=1e-5)


def test_two_processes_share_the_count_of_corrupt_images(children, spoilt_images, vae_folder, tmp_path):
    flags = ["--data-path", spoilt_images, "--image-size", 32, "--vae", vae_folder, "--num-workers", 0,
             "--batch-size", 1]
    out = children.run("extract_features", *flags, "--features-path", tmp_path / "three", "--max-bad-images", 3,
                       processes=2)
    assert out.count("WARNING: skipped the image") == 3 and "3 of 3 corrupt" in out
    out = children.run("extract_features", *flags, "--features-path", tmp_path / "two", "--max-bad-images", 2,
                       processes=2, status=2)
    assert "--max-bad-images 2: cannot read" in out and "Traceback" not in out


def test_unreadable_file_stops_the_run_whatever_the_limit(extract, few_images, tmp_path, monkeypatch):
    """It may be there the next time."""
    shutil.copytree(few_images, tmp_path / "images")
    path = ImageFolderDataset(few_images, 32).paths[7]
    read = ImageFolderDataset.read
    def read_after_removal(self, index):
        if index == 7:
            os.remove(tmp_path / "images" / path)
        return read(self, index)

    monkeypatch.setattr(ImageFolderDataset, "examples", lambda self, count: None)
    monkeypatch.setattr(ImageFolderDataset, "read", read_after_removal)
    err = extract(tmp_path / "images", tmp_path / "cache", "--max-bad-images", 9, fails=True)
    assert f"cannot read {tmp_path}/images/{path} (FileNotFoundError" in err


def test_corrupt_images_are_replaced_as_in_training_from_images(extract, spoilt_images, tmp_path):
    extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 3, "--dtype", "fp32")
    data, cache = ImageFolderDataset(str(spoilt_images), 32, max_bad_images=3), LatentCache(str(tmp_path / "cache"))
    keys = [(i, flip) for i in range(13) for flip in (False, True)]
    images, cond, _ = data.__getitems__(keys)
    want = load_autoencoder(cache.manifest["vae"]).moments(images)
    for answer in (cache.__getitems__(keys), cache.to_device("cpu").__getitems__(keys)):
        assert torch.equal(answer.cond["y"], cond["y"])
        torch.testing.assert_close(answer.images, want, rtol=1e-5, atol=1e-5)


def test_data_set_without_a_readable_image_is_refused(extract, tmp_path):
    images = write_images(tmp_path / "images", {f"a/{i}.png": b"" for i in range(3)})
    assert "none of the images could be read" in extract(images, tmp_path / "cache", "--max-bad-images", 9, fails=True)


def test_verify_finds_one_flipped_bit(run_ok, run_error, small_files, cache):
    flags = ["--features-path", cache, "--verify"]
    assert "is as it was written: 13 images" in run_ok("extract_features", *flags)
    chance = random.Random(0)
    for name, raw in read_files(cache).items():
        for place in {0, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(3))}:
            spoilt = bytearray(raw)
            spoilt[place] ^= 1 << chance.randrange(8)
            (cache / name).write_bytes(spoilt)
            assert name in run_error("extract_features", *flags), place
        (cache / name).write_bytes(raw)
    assert verify(str(cache)) == []


def test_verify_finds_missing_and_short_files(cache):
    replace(cache, "moments-000.npy", lambda raw: raw[:-1])
    (cache / "paths.txt").unlink()
    problems = verify(str(cache))
    assert len(problems) == 2 and "moments-000.npy has" in problems[0] and problems[1] == "paths.txt is missing"


def test_two_processes_share_the_verification(children, small_files, cache):
    flags = ["--features-path", cache, "--verify"]
    assert "is as it was written" in children.run("extract_features", *flags, processes=2)
    for name in ("moments-000.npy", "moments-001.npy"):
        replace(cache, name, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    out = children.run("extract_features", *flags, processes=2, status=2)
    assert out.count("is damaged: moments-000.npy") == 1 and "moments-001.npy has the SHA-256" in out


def make_incomplete(folder):
    """Take a complete cache back to where it was after seven images."""
    manifest = read_manifest(str(folder))
    del manifest["files"], manifest["bad_images"]
    write_manifest(str(folder), manifest | dict(complete=False))
    np.save(folder / "progress.npy", np.array([1] * 7 + [0] * 6, dtype=np.uint8))


def replace(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("spoil, sentence", [
    (make_incomplete, r"is not complete: 7 of 13 images are encoded"),
    (lambda folder: (folder / "manifest.json").unlink(), r"holds no manifest\.json"),
    (lambda folder: replace(folder, "manifest.json", lambda raw: raw[:-20]), r"manifest\.json is damaged"),
    (lambda folder: replace(folder, "manifest.json", lambda raw: raw.replace(b"0.5", b"0.6")),
     r"checksum does not match"),
    (lambda folder: replace(folder, "manifest.json", lambda raw: raw.replace(b"latents-1", b"latents-9")),
     r"format 'dit-latents-9', this code reads 'dit-latents-1'"),
    (lambda folder: replace(folder, "manifest.json", lambda raw: b"[1]"), r"manifest\.json is damaged"),
    (lambda folder: replace(folder, "moments-000.npy", lambda raw: raw[:-1]), r"moments-000\.npy has \d+ bytes"),
    (lambda folder: replace(folder, "moments-000.npy", lambda raw: raw.replace(b"f2", b"i2")), r"has another header"),
    (lambda folder: (folder / "moments-000.npy").unlink(), r"moments-000\.npy is missing"),
    (lambda folder: (folder / "labels.npy").unlink(), r"labels\.npy is missing"),
    (lambda folder: replace(folder, "labels.npy", lambda raw: raw[:-8] + b"\7" * 8), r"labels\.npy was changed"),
], ids=["incomplete", "no manifest", "half a manifest", "edited", "format", "list", "short", "header", "gone",
        "no labels", "other labels"])
def test_incomplete_or_damaged_cache_is_refused(cache, spoil, sentence):
    LatentCache(str(cache))
    spoil(cache)
    with pytest.raises(UserError, match=sentence):
        LatentCache(str(cache))


def test_the_cache_of_another_vae_is_refused(cache, vae_folder, other_vae):
    """Another decoder alone is no other VAE: the paper's two differ in it."""
    latents = LatentCache(str(cache))
    for vae, reason in ((other_vae(), "another VAE .*"), ("none", ""), ("/nowhere", r"there is no such folder.*")):
        with pytest.raises(ArgumentError, match=rf"--vae {vae}: {reason}[Tt]he cache .* made with {vae_folder}"):
            load_cached_latents(latents, vae=str(vae))
    with pytest.raises(ArgumentError, match=r"scale=0\.25.*scale=0\.5"):
        load_cached_latents(latents, vae=str(other_vae(scaling_factor=0.25)))
    with pytest.raises(ArgumentError, match=r"--image-size 64: .* of images of 32 pixels"):
        load_cached_latents(latents, image_size=64)
    other_decoder = str(other_vae(part="decoder"))
    assert load_cached_latents(latents, other_decoder, 32, needs_decoder=True).name == other_decoder


def test_nothing_is_loaded_unless_it_decodes(extract, few_images, vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    extract(few_images, tmp_path / "cache", "--vae", tmp_path / "vae")
    shutil.rmtree(tmp_path / "vae")
    cache = LatentCache(str(tmp_path / "cache"))
    autoencoder = load_cached_latents(cache)
    assert autoencoder.vae is None and autoencoder.name == str(tmp_path / "vae")
    assert (autoencoder.channels, autoencoder.stride) == (4, 4)
    with raises_argument("If it was moved, pass its new place", vae=str(tmp_path / "vae")):
        load_cached_latents(cache, needs_decoder=True)


def test_pixels_are_not_cached(run_error, few_images, tmp_path):
    folder = ["--features-path", tmp_path / "cache"]
    assert "--vae none: " in run_error("extract_features", "--data-path", few_images, *folder, "--vae", "none")
    assert "--data-path: missing" in run_error("extract_features", *folder)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_copy_on_the_device_gives_the_same_batches(extract, few_images, tmp_path, small_files, dtype):
    extract(few_images, tmp_path / "cache", "--dtype", dtype)
    cache = LatentCache(str(tmp_path / "cache"))
    loaded = cache.to_device("cpu")
    keys = [(i, flip) for i in (12, 3, 0, 5, 4) for flip in (True, False)]
    want, got = cache.__getitems__(keys), loaded.__getitems__(keys)
    assert torch.equal(want.images, got.images) and torch.equal(want.cond["y"], got.cond["y"])
    assert len(loaded) == 13 and loaded.on_device and not cache.on_device


def test_cache_that_does_not_fit_on_the_device_is_refused(cache, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with raises_argument(r"takes 0\.03 MB, cpu has 0\.00 MB free", cache_on_device=True):
        LatentCache(str(cache)).to_device("cpu")


def test_file_that_is_cut_short_while_it_is_read_is_an_error(cache):
    latents, path = LatentCache(str(cache)), cache / "moments-000.npy"
    os.truncate(path, path.stat().st_size // 2)
    latents.__getitems__([(0, False)])
    with pytest.raises(UserError, match=r"moments-000\.npy was cut short"):
        latents.__getitems__([(12, False)])


def test_workers_may_be_spawned(cache):
    latents = LatentCache(str(cache))
    want = latents.__getitems__([(5, True)]).images
    assert torch.equal(pickle.loads(pickle.dumps(latents)).__getitems__([(5, True)]).images, want)


def test_memory_does_not_grow_with_the_cache(tmp_path):
    images = SimpleNamespace(labels=[0] * 1600, paths=[str(i) for i in range(1600)], class_names=["a"])
    autoencoder = SimpleNamespace(latent_scaling=LatentScaling(4, 8, 1.0, 0.0), channels=4, stride=8, name="none",
                                  encoder_sha256="")
    writer = LatentCacheWriter(str(tmp_path), new_manifest(images, "", autoencoder, 256, True, "fp32", "fp32"))
    writer.prepare(images)
    for first in range(0, 1600, 100):
        writer.write(first, torch.randn(100, 2, 8, 32, 32), [False] * 100)
    writer.finish(images, {name: sha256_file(tmp_path / name) for name in writer.file_names()})
    cache, process = LatentCache(str(tmp_path)), psutil.Process()
    order = torch.randperm(1600, generator=torch.Generator().manual_seed(0)).tolist()
    def mapped():
        return sum(part.rss for part in process.memory_maps() if part.path.startswith(str(tmp_path)))

    for first in range(0, 1600, 100):
        cache.__getitems__([(index, index % 2 == 0) for index in order[first:first + 100]])
        assert mapped() < 5e6
    memory_map = np.load(tmp_path / "moments-000.npy", mmap_mode="r")
    assert memory_map.sum() != 0 and mapped() > 50e6  # the control: a memory map would hold it
