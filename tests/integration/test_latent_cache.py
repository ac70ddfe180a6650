"""extract_features.py and its cache: the same bytes for any number of processes and restarts."""
import errno
import json
import os
import pickle
import random
import shutil
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import data.latent_cache.manifest
from autoencoder.vae import VAE, LatentScaling, load_autoencoder, load_cached_latents
from common.errors import ArgumentError, UserError
from common.files import sha256_file
from data.image_folder import ImageFolderDataset
from data.latent_cache.manifest import CORRUPT, ENCODED, MISSING, new_manifest, read_manifest
from data.latent_cache.reader import LatentCache, verify
from data.latent_cache.writer import LatentCacheWriter
from helpers import ROOT, picture, wait_for, write_images

SIZE = 32


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """13 images in three classes."""
    files = {f"{'abc'[i % 3]}/{i:02d}.png": Image.fromarray(picture(40 + i, 36, 3, seed=i)) for i in range(13)}
    return write_images(tmp_path_factory.mktemp("few"), files)


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """2,000 images in five classes."""
    files = {f"class-{i % 5}/{i:04d}.png": Image.fromarray(picture(6, 7, 3, seed=i)).resize((33 + i % 30, 32 + i % 17))
             for i in range(2000)}
    return write_images(tmp_path_factory.mktemp("many"), files)


@pytest.fixture
def extract(command, vae_folder):
    """Run extract_features.py in this process; asserts that it ends without an error, or with one if it `fails`."""
    def run(images, folder, *flags, fails=False):
        flags = ["--data-path", images, "--features-path", folder, "--image-size", SIZE, "--vae", vae_folder,
                 "--num-workers", 0, "--batch-size", 4, *flags]
        status, out, err = command("extract_features", *flags)
        assert status == (2 if fails else 0), err
        return err if fails else out
    return run


def small_files(monkeypatch, rows=5):
    """Files of so many rows (of 8x8x8 fp16 in two orientations), so that a small cache has several."""
    monkeypatch.setattr(data.latent_cache.manifest, "MAX_FILE_BYTES", rows * 2 * 8 * 8 * 8 * 2 + 17)


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def expected_moments(images, vae_folder):
    """(13, 2, 8, 8, 8): the moments of each image and of its mirror image, from the VAE itself."""
    data, autoencoder = ImageFolderDataset(images, SIZE), load_autoencoder(str(vae_folder))
    pixels = torch.stack([data.read(i) for i in range(len(data))])
    return torch.stack([autoencoder.moments(pixels), autoencoder.moments(pixels.flip(-1))], dim=1)


# ---------------------------------------------------------------- contents

@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_moments_are_those_of_both_orientations(extract, few_images, vae_folder, tmp_path, monkeypatch, dtype,
                                                tolerance):
    """Over several files, in the order of the data set, each value rounded once."""
    small_files(monkeypatch)
    extract(few_images, tmp_path / "cache", "--dtype", dtype)
    cache, data = LatentCache(str(tmp_path / "cache")), ImageFolderDataset(few_images, SIZE)
    assert len(cache) == 13 and len(cache.layout.names) >= 3
    want = expected_moments(few_images, vae_folder)
    keys = [(i, flip) for i in (12, 0, 4, 5, 9, 10, 7) for flip in (True, False)]
    got, cond, corrupt = cache.__getitems__(keys)
    assert got.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype] and corrupt == []
    assert cond["y"].tolist() == [data.labels[i] for i, _ in keys] and cond["y"].dtype == torch.int64
    for row, (i, flip) in zip(got, keys):
        torch.testing.assert_close(row.float(), want[i, int(flip)], rtol=tolerance, atol=1e-5)
    assert (cache.class_names, cache.flips, cache.channels, cache.image_size) == (["a", "b", "c"], True, 3, SIZE)
    paths = (tmp_path / "cache" / "paths.txt").read_text().splitlines()
    assert paths == list(data.paths) and paths[0] == "a/00.png"


def test_mirror_images_are_encoded_not_mirrored(extract, few_images, vae_folder, tmp_path):
    """A VAE's latents of a mirror image are not the mirrored latents."""
    extract(few_images, tmp_path / "cache")
    plain, mirror = LatentCache(str(tmp_path / "cache")).__getitems__([(3, False), (3, True)]).images.float()
    assert (plain.flip(-1) - mirror).abs().max() > 0.01


def test_no_flip_halves_the_cache(extract, few_images, tmp_path):
    """Half the size; the same numbers."""
    extract(few_images, tmp_path / "both")
    extract(few_images, tmp_path / "one", "--no-flip")
    both, one = LatentCache(str(tmp_path / "both")), LatentCache(str(tmp_path / "one"))
    keys = [(i, False) for i in range(13)]
    assert torch.equal(both.__getitems__(keys).images, one.__getitems__(keys).images)
    assert one.layout.row_bytes * 2 == both.layout.row_bytes and not one.flips


def test_manifest_describes_the_cache(extract, few_images, vae_folder, tmp_path):
    out = extract(few_images, tmp_path / "cache")
    assert "13 images and their mirror images, 8x8x8 fp16 each: 0.03 MB" in out and "PSNR" in out
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["vae"] == str(vae_folder)
    assert manifest["vae_sha256"] == load_autoencoder(str(vae_folder)).encoder_sha256
    assert manifest["space"] == dict(channels=4, stride=4, scale=0.5, shift=0.0, image_channels=3)
    assert (manifest["image_size"], manifest["count"], manifest["classes"], manifest["dtype"]) == (
        SIZE, 13, ["a", "b", "c"], "fp16")
    assert "center" in manifest["crop"] and manifest["data_path"] == few_images
    assert set(manifest["files"]) == set(os.listdir(tmp_path / "cache")) - {"manifest.json"}
    for name, stated in manifest["files"].items():
        assert stated["bytes"] == (tmp_path / "cache" / name).stat().st_size


def test_vae_of_one_channel_encodes_digits(command, tmp_path):
    """Any data set that train.py knows, any channels: the digits are not mirrored."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=3,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(tmp_path / "vae")
    status, _, err = command("extract_features", "--data-path", "digits", "--image-size", 8, "--vae", tmp_path / "vae",
                             "--features-path", tmp_path / "cache", "--num-workers", 0, "--batch-size", 500)
    assert status == 0, err
    cache = LatentCache(str(tmp_path / "cache"))
    assert len(cache) == 1438 and not cache.flips and cache.channels == 1
    assert cache.__getitems__([(7, False)]).images.shape == (1, 6, 4, 4)


def test_bfloat16_encoder_is_close_to_float32(extract, few_images, vae_folder, tmp_path):
    """Near the moments of float32, and not the same."""
    extract(few_images, tmp_path / "cache", "--precision", "bf16", "--dtype", "fp32")
    got = LatentCache(str(tmp_path / "cache")).__getitems__([(i, False) for i in range(13)]).images
    want = expected_moments(few_images, vae_folder)[:, 0]
    difference = (got - want).abs().max().item()
    assert 1e-4 < difference < 0.05 * want.abs().max()


def test_code_in_the_docs_reads_the_cache(extract, few_images, vae_folder, tmp_path, monkeypatch):
    """The lines that docs/latents.md shows, run as they stand there."""
    small_files(monkeypatch)
    extract(few_images, tmp_path / "latents")
    text = (ROOT / "docs" / "latents.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "np.load" in block).split("```")[0]
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)
    for i, flip in ((11, 1), (4, 0)):
        space = dict(i=i, flip=flip)
        state = np.random.get_state()
        exec(code, space)
        np.random.set_state(state)
        noise = torch.tensor(np.random.randn(4, 8, 8)[None])
        moments = LatentCache("latents").__getitems__([(i, bool(flip))]).images
        want = load_autoencoder(str(vae_folder)).latent_scaling.draw(moments, noise)[0]
        np.testing.assert_allclose(space["latent"], want, rtol=1e-5, atol=1e-6)
        assert space["latent"].dtype == np.float32


def test_code_in_the_docs_draws_latents(extract, few_images, vae_folder, tmp_path, monkeypatch):
    extract(few_images, tmp_path / "latents", "--dtype", "fp32")
    text = (ROOT / "docs" / "latents.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "load_cached_latents" in block).split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    mean = expected_moments(few_images, vae_folder)[[0, 7], [0, 1]].chunk(2, dim=1)[0]
    torch.testing.assert_close(names["latents"], 0.5 * mean, rtol=1e-5, atol=1e-5)
    assert names["cond"]["y"].tolist() == ImageFolderDataset(few_images, SIZE).labels[[0, 7]].tolist()


# ---------------------------------------------------------------- the same bytes

@pytest.fixture(scope="module")
def whole_cache(module_children, many_images, vae_folder, tmp_path_factory):
    """A cache that one process made undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    module_children.run("extract_features", *flags_for_many(many_images, vae_folder, folder))
    return folder


def flags_for_many(images, vae, folder):
    return ["--data-path", images, "--features-path", folder, "--image-size", SIZE, "--vae", vae, "--num-workers", 1]


def test_two_processes_write_the_bytes_of_one(children, many_images, vae_folder, whole_cache, tmp_path):
    out = children.run("extract_features", *flags_for_many(many_images, vae_folder, tmp_path / "cache"), processes=2)
    assert out.count("is complete: 2,000 images") == 1
    assert contents(tmp_path / "cache") == contents(whole_cache)
    assert len(LatentCache(str(whole_cache))) == 2000


def test_ten_kills_leave_no_trace(children, many_images, vae_folder, whole_cache, tmp_path):
    """SIGKILL at random moments, from the start of the program on: the bytes are those of an undisturbed run."""
    flags = flags_for_many(many_images, vae_folder, tmp_path / "cache")
    chance, kills, seen = random.Random(0), 0, []
    while kills < 10:
        workers = int(kills == 5)  # once: a worker that lost its master takes five seconds to see it
        (child,) = children.start("extract_features", *flags, "--num-workers", workers)
        reached = seen[-1] if seen else 0
        wait_for(lambda child=child, reached=reached: encoded(tmp_path / "cache") > reached or not child.is_alive())
        time.sleep(chance.random() * 0.1)
        assert child.is_alive(), "it ended before it could be killed ten times: give it more images"
        child.kill()
        child.join()
        kills += 1
        seen.append(encoded(tmp_path / "cache"))
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < 2000
    children.run("extract_features", *flags)
    assert contents(tmp_path / "cache") == contents(whole_cache)


def encoded(folder):
    path = folder / "progress.npy"
    return int((np.fromfile(path, dtype=np.uint8)[128:] == ENCODED).sum()) if path.exists() else 0


def test_missing_data_is_reported_once_by_two_processes(children, vae_folder, tmp_path):
    group = children.start("extract_features", *flags_for_many(tmp_path / "none", vae_folder, tmp_path / "cache"),
                           processes=2)
    for child in group:
        child.join(60)
    assert [child.exitcode for child in group] == [2, 2]
    assert sum(child.log.read_text().count("there is no such folder") for child in group) == 1


def test_nothing_is_encoded_twice(extract, few_images, vae_folder, tmp_path, monkeypatch):
    """A run that was stopped after two batches encodes the rest; one that was complete, nothing."""
    extract(few_images, tmp_path / "whole")
    stopped_after(8, extract, few_images, tmp_path / "cache", monkeypatch)
    passes, moments = [], VAE.moments

    def counted(self, images):
        passes.append(len(images))
        return moments(self, images)

    monkeypatch.setattr(VAE, "moments", counted)
    out = extract(few_images, tmp_path / "cache")
    assert "8 images are there already" in out
    assert passes == [*[1] * 8, 4, 4, 1, 1]  # a look at eight images; the batches 8 .. 11 and 12, in two orientations
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    passes.clear()
    assert "is complete: 13 images" in extract(few_images, tmp_path / "cache") and passes == []


def stopped_after(count, extract, images, folder, monkeypatch):
    """Extract, and fail when the batch of the image number `count` is to be written."""
    write = LatentCacheWriter.write

    def stops(self, first, *rest):
        if first >= count:
            raise UserError("stopped")
        return write(self, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LatentCacheWriter, "write", stops)
        assert "stopped" in extract(images, folder, fails=True)


def test_resuming_with_another_batch_size_keeps_what_is_done(extract, few_images, tmp_path, monkeypatch):
    """As after running out of memory: what is there is kept, ranges fill the gaps."""
    stopped_after(4, extract, few_images, tmp_path / "cache", monkeypatch)
    extract(few_images, tmp_path / "cache", "--batch-size", 3)
    cache = LatentCache(str(tmp_path / "cache"))
    extract(few_images, tmp_path / "whole")
    keys = [(i, True) for i in range(13)]
    torch.testing.assert_close(cache.__getitems__(keys).images, LatentCache(str(tmp_path / "whole")).__getitems__(
        keys).images, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("flags, sentence", [
    (["--image-size", "16"], r"--image-size 16: .* another cache, of image_size 32"),
    (["--dtype", "fp32"], r"--dtype fp32: .* another cache, of dtype fp16"),
    (["--no-flip"], r"--flip False: .* another cache, of orientations 2"),
    (["--precision", "bf16"], r"--precision bf16: .* another cache, of precision tf32"),
])
def test_folder_of_another_cache_is_refused_and_unchanged(extract, few_images, tmp_path, flags, sentence):
    extract(few_images, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(AssertionError, match=sentence):
        extract(few_images, tmp_path / "cache", *flags)
    assert contents(tmp_path / "cache") == before


def test_other_images_or_another_vae_are_refused(extract, few_images, image_folder, vae_folder, tmp_path):
    extract(few_images, tmp_path / "cache")
    err = extract(image_folder, tmp_path / "cache", fails=True)
    assert "--data-path" in err and "another cache" in err
    shutil.copytree(few_images, tmp_path / "moved")
    extract(tmp_path / "moved", tmp_path / "cache")  # the same images in another place
    (tmp_path / "moved" / "a" / "03.png").rename(tmp_path / "moved" / "a" / "04.png")
    assert "of 13 other images" in extract(tmp_path / "moved", tmp_path / "cache", fails=True)
    scaled = other_vae(vae_folder, tmp_path, scaling_factor=0.25)
    err = extract(few_images, tmp_path / "cache", "--vae", scaled, fails=True)
    assert f"--vae {scaled}: " in err and "'scale': 0.5" in err
    other = other_vae(vae_folder, tmp_path)
    err = extract(few_images, tmp_path / "cache", "--vae", other, fails=True)
    assert str(vae_folder) in err and str(other) in err


def other_vae(vae_folder, tmp_path, part="encoder", **config):
    """A copy of the VAE with one weight of its encoder or decoder changed, or another configuration."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(vae_folder)
    if not config:
        next(getattr(vae, part).parameters()).data.flatten()[0] += 1
    vae.register_to_config(**config)
    vae.save_pretrained(tmp_path / "other-vae")
    return tmp_path / "other-vae"


# ---------------------------------------------------------------- disks

def test_too_small_disk_is_refused_before_writing(extract, few_images, tmp_path, monkeypatch):
    """Refused before anything is written, both numbers named."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    err = extract(few_images, tmp_path / "cache", fails=True)
    assert "0.03 MB are needed" in err and "0.02 MB free" in err
    assert not list((tmp_path / "cache").iterdir())


def test_restart_needs_disk_for_the_rest_alone(extract, many_images, vae_folder, whole_cache, tmp_path, monkeypatch):
    """A restart asks for the rest alone."""
    shutil.copytree(whole_cache, tmp_path / "cache")
    data, autoencoder = ImageFolderDataset(many_images, SIZE), load_autoencoder(str(vae_folder))
    writer = LatentCacheWriter(str(tmp_path / "cache"), new_manifest(data, "", autoencoder, SIZE, True, "fp16", "tf32"))
    assert writer.count_bytes_left() < 10_000
    empty = LatentCacheWriter(str(tmp_path / "empty"), writer.manifest)
    assert empty.count_bytes_left() == 4_096_128
    empty.prepare(data)
    assert empty.count_bytes_left() > 4_000_000  # the files have their length, and take nothing yet


def test_full_disk_is_an_error_and_the_run_resumes(extract, few_images, tmp_path, monkeypatch):
    """A sentence; what was written stays, and the next run completes it to the same bytes."""
    extract(few_images, tmp_path / "whole")
    pwrite, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(len(data))
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[:100_000], offset)

    monkeypatch.setattr(os, "pwrite", full)
    err = extract(few_images, tmp_path / "cache", fails=True)
    assert "cannot write the images 8 .. 11 ([Errno 28] No space left on device)" in err
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "8 images are there already" in extract(few_images, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_short_writes_are_continued(extract, few_images, tmp_path, monkeypatch):
    extract(few_images, tmp_path / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    extract(few_images, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_links_are_not_written_through(extract, few_images, tmp_path, monkeypatch):
    """In the place of a file of half a cache."""
    stopped_after(4, extract, few_images, tmp_path / "cache", monkeypatch)
    (tmp_path / "cache" / "moments-000.npy").rename(tmp_path / "outside.npy")
    (tmp_path / "cache" / "moments-000.npy").symlink_to(tmp_path / "outside.npy")
    before = (tmp_path / "outside.npy").read_bytes()
    assert "is missing or was changed" in extract(few_images, tmp_path / "cache", fails=True)
    (tmp_path / "cache" / "progress.npy").unlink()
    extract(few_images, tmp_path / "cache")
    assert (tmp_path / "outside.npy").read_bytes() == before
    assert not (tmp_path / "cache" / "moments-000.npy").is_symlink()


def test_second_extraction_is_refused_while_one_runs(children, extract, many_images, vae_folder, tmp_path):
    """The second is refused, and leaves the first alone."""
    flags = flags_for_many(many_images, vae_folder, tmp_path / "cache")
    (child,) = children.start("extract_features", *flags)
    wait_for(lambda: encoded(tmp_path / "cache") > 0)
    err = extract(many_images, tmp_path / "cache", "--batch-size", 32, fails=True)
    assert "another extraction is writing to it" in err
    child.join(60)
    assert child.exitcode == 0 and verify(str(tmp_path / "cache")) == []


def test_folders_that_are_not_a_cache_are_not_written_to(extract, few_images, tmp_path):
    """Is not written to: other people's files, or moments that lost their manifest."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "the folder is not empty, and has no manifest.json" in extract(few_images, tmp_path / "mine", fails=True)
    extract(few_images, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    before = contents(tmp_path / "cache")
    assert "the folder is not empty, and has no manifest.json" in extract(few_images, tmp_path / "cache", fails=True)
    assert contents(tmp_path / "cache") == before
    shutil.copytree(few_images, tmp_path / "images")
    for inside in (tmp_path / "images", tmp_path / "images" / "latents"):
        assert "lies in --data-path" in extract(tmp_path / "images", inside, fails=True)
    (tmp_path / "killed").mkdir()  # as a kill leaves it before anything was written
    for name in ("extraction.lock", "manifest.json.77.tmp"):
        (tmp_path / "killed" / name).touch()
    extract(few_images, tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == ["labels.npy", "manifest.json", "moments-000.npy", "paths.txt"]


def test_damaged_complete_cache_is_refused(extract, few_images, tmp_path):
    extract(few_images, tmp_path / "cache")
    (tmp_path / "cache" / "moments-000.npy").unlink()
    assert "moments-000.npy is missing" in extract(few_images, tmp_path / "cache", fails=True)


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
    (tmp_path / "file").write_text("")
    err = extract(few_images, tmp_path / "file" / "cache", fails=True)
    assert f"--features-path {tmp_path}/file/cache: cannot be written to" in err


def test_changed_files_of_an_incomplete_cache_are_refused(extract, few_images, tmp_path, monkeypatch):
    """What was encoded before is not looked at again: a file that went missing meanwhile must not come back empty."""
    stopped_after(4, extract, few_images, tmp_path / "cache", monkeypatch)
    for name in ("moments-000.npy", "progress.npy"):
        raw = (tmp_path / "cache" / name).read_bytes()
        for spoilt in (raw[:-1], b"\0" * 10 + raw[10:], None):
            (tmp_path / "cache" / name).unlink()
            if spoilt is not None:
                (tmp_path / "cache" / name).write_bytes(spoilt)
            elif name == "progress.npy":
                break  # without it nothing counts as done
            assert f"{name} is missing or was changed" in extract(few_images, tmp_path / "cache", fails=True)
            (tmp_path / "cache" / name).write_bytes(raw)
    extract(few_images, tmp_path / "cache")
    extract(few_images, tmp_path / "whole")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_values_beyond_the_dtype_are_refused(few_images, vae_folder, tmp_path, dtype):
    """float16 ends at 65504."""
    data, autoencoder = ImageFolderDataset(few_images, SIZE), load_autoencoder(str(vae_folder))
    writer = LatentCacheWriter(str(tmp_path / "cache"), new_manifest(data, "", autoencoder, SIZE, True, dtype, "fp32"))
    writer.prepare(data)
    moments = torch.full((3, 2, 8, 8, 8), 70000.0)
    if dtype == "fp16":
        with pytest.raises(ArgumentError, match=r"images 2 \.\. 4, up to 7e\+04") as caught:
            writer.write(2, moments, [False] * 3)
        assert caught.value.arguments == {"dtype": "fp16"}
    else:
        writer.write(2, moments, [False] * 3)
    assert (writer.progress() == MISSING).sum() == (13 if dtype == "fp16" else 10)


# ---------------------------------------------------------------- corrupt images

@pytest.fixture
def spoilt_images(few_images, tmp_path):
    """The 13 images, of which the second, the third and the last (in the data set's order) are none."""
    shutil.copytree(few_images, tmp_path / "spoilt")
    paths = ImageFolderDataset(few_images, SIZE).paths
    for index in (1, 2, 12):
        path = tmp_path / "spoilt" / paths[index]
        path.write_bytes(path.read_bytes()[:200] if index > 1 else b"")
    return tmp_path / "spoilt"


def test_first_corrupt_image_stops_the_run_by_default(extract, spoilt_images, tmp_path):
    err = extract(spoilt_images, tmp_path / "cache", fails=True)
    assert f"cannot read the image {spoilt_images}/a/03.png" in err and "--max-bad-images" in err
    assert encoded(tmp_path / "cache") == 0


def test_allowed_corrupt_images_are_left_out_and_listed(extract, spoilt_images, tmp_path):
    """Two of three allowed: it stops at the third. Three: they are counted, and nothing good is done twice."""
    err = extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 2, fails=True)
    assert "c/11.png" in err and "--max-bad-images 2: cannot read" in err and "number 3 in all" in err
    out = extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 3)
    assert "10 images are there already" in out and "3 of 3 corrupt images that --max-bad-images allows" in out
    assert "is complete: 13 images, 3 of them corrupt" in out
    assert "is complete: 13 images, 3 of them corrupt" in extract(spoilt_images, tmp_path / "cache")
    for index in (1, 2, 12):
        assert not np.load(tmp_path / "cache" / "moments-000.npy")[index].any()  # zeros, as the docs say
    manifest = read_manifest(str(tmp_path / "cache"))
    assert manifest["bad_images"] == [[1, "a/03.png"], [2, "a/06.png"], [12, "c/11.png"]]


def test_corrupt_images_are_tried_again_by_the_next_run(extract, few_images, spoilt_images, tmp_path):
    """At the next run: once repaired, they are images like any other, and not counted."""
    extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 2, fails=True)
    shutil.copytree(few_images, spoilt_images, dirs_exist_ok=True)
    out = extract(spoilt_images, tmp_path / "cache")
    assert "is complete: 13 images. " in out and read_manifest(str(tmp_path / "cache"))["bad_images"] == []
    extract(few_images, tmp_path / "whole")
    keys = [(i, True) for i in range(13)]
    torch.testing.assert_close(LatentCache(str(tmp_path / "cache")).__getitems__(keys).images, LatentCache(
        str(tmp_path / "whole")).__getitems__(keys).images, rtol=2**-10, atol=1e-5)


def test_restart_counts_corrupt_images_again(extract, spoilt_images, tmp_path):
    extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 2, fails=True)
    assert "cannot read the image" in extract(spoilt_images, tmp_path / "cache", fails=True)


def test_two_processes_share_the_count_of_corrupt_images(children, spoilt_images, vae_folder, tmp_path):
    """Whoever meets them: three are three."""
    flags = ["--data-path", spoilt_images, "--image-size", SIZE, "--vae", vae_folder, "--num-workers", 0,
             "--batch-size", 1]
    out = children.run("extract_features", *flags, "--features-path", tmp_path / "three", "--max-bad-images", 3,
                       processes=2)
    assert out.count("WARNING: skipped the image") == 3 and "3 of 3 corrupt" in out
    group = children.start("extract_features", *flags, "--features-path", tmp_path / "two", "--max-bad-images", 2,
                           processes=2)
    for child in group:
        child.join(60)
    text = "".join(child.log.read_text() for child in group)
    assert all(child.exitcode == 2 for child in group) and "Traceback" not in text
    assert "--max-bad-images 2: cannot read" in text


def test_unreadable_file_stops_the_run_whatever_the_limit(extract, few_images, tmp_path, monkeypatch):
    """Whatever the limit: the file may be there the next time."""
    shutil.copytree(few_images, tmp_path / "images")
    data = ImageFolderDataset(few_images, SIZE)
    listed = ImageFolderDataset.read

    def read(self, index):
        if index == 7:
            os.rename(tmp_path / "images" / data.paths[7], tmp_path / "images" / "elsewhere")
        return listed(self, index)

    monkeypatch.setattr(ImageFolderDataset, "examples", lambda self, count: None)
    monkeypatch.setattr(ImageFolderDataset, "read", read)
    err = extract(tmp_path / "images", tmp_path / "cache", "--max-bad-images", 9, fails=True)
    assert f"cannot read {tmp_path}/images/{data.paths[7]} (FileNotFoundError" in err


def test_corrupt_images_are_replaced_as_in_training_from_images(extract, spoilt_images, tmp_path):
    extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 3, "--dtype", "fp32")
    data, cache = ImageFolderDataset(str(spoilt_images), SIZE, max_bad_images=3), LatentCache(str(tmp_path / "cache"))
    keys = [(i, flip) for i in range(13) for flip in (False, True)]
    images, cond, _ = data.__getitems__(keys)
    for answer in (cache.__getitems__(keys), cache.to_device("cpu").__getitems__(keys)):
        assert torch.equal(answer.cond["y"], cond["y"])
        want = load_autoencoder(cache.manifest["vae"]).moments(images)
        torch.testing.assert_close(answer.images, want, rtol=1e-5, atol=1e-5)


def test_data_set_without_a_readable_image_is_refused(extract, tmp_path):
    images = write_images(tmp_path / "images", {f"a/{i}.png": b"" for i in range(3)})
    assert "none of the images could be read" in extract(images, tmp_path / "cache", "--max-bad-images", 9, fails=True)


# ---------------------------------------------------------------- damage

def test_verify_finds_one_flipped_bit(command, extract, few_images, tmp_path, monkeypatch):
    """Anywhere, in every file, the manifest's own digits included."""
    small_files(monkeypatch)
    folder = tmp_path / "cache"
    extract(few_images, folder)
    status, out, _ = command("extract_features", "--features-path", folder, "--verify")
    assert status == 0 and "is as it was written: 13 images" in out
    chance = random.Random(0)
    for name, raw in contents(folder).items():
        for place in {0, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(3))}:
            spoilt = bytearray(raw)
            spoilt[place] ^= 1 << chance.randrange(8)
            (folder / name).write_bytes(spoilt)
            status, _, err = command("extract_features", "--features-path", folder, "--verify")
            assert status == 2 and name in err and "Traceback" not in err, (name, place)
        (folder / name).write_bytes(raw)
    assert verify(str(folder)) == []


def test_verify_finds_missing_and_short_files(extract, few_images, tmp_path):
    folder = tmp_path / "cache"
    extract(few_images, folder)
    raw = (folder / "moments-000.npy").read_bytes()
    (folder / "moments-000.npy").write_bytes(raw[:-1])
    (folder / "paths.txt").unlink()
    problems = verify(str(folder))
    assert len(problems) == 2 and "moments-000.npy has" in problems[0] and problems[1] == "paths.txt is missing"


def test_two_processes_share_the_verification(children, extract, few_images, tmp_path, monkeypatch):
    """Each reads its share, and one sentence names all."""
    small_files(monkeypatch)
    folder = tmp_path / "cache"
    extract(few_images, folder)
    flags = ["--features-path", folder, "--verify"]
    assert "is as it was written" in children.run("extract_features", *flags, processes=2)
    for name in ("moments-000.npy", "moments-001.npy"):
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)
    out = children.run("extract_features", *flags, processes=2, status=2)
    assert out.count("is damaged: moments-000.npy") == 1 and "moments-001.npy has the SHA-256" in out


def incomplete(folder):
    """Take a complete cache back to where it was after seven images."""
    manifest = read_manifest(str(folder))
    del manifest["files"], manifest["bad_images"]
    data.latent_cache.manifest.write_manifest(str(folder), manifest | dict(complete=False))
    np.save(folder / "progress.npy", np.array([1] * 7 + [0] * 6, dtype=np.uint8))


def replace(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("spoil, sentence", [
    (incomplete, r"is not complete: 7 of 13 images are encoded"),
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
def test_incomplete_or_damaged_cache_is_refused(extract, few_images, tmp_path, spoil, sentence):
    extract(few_images, tmp_path / "cache")
    LatentCache(str(tmp_path / "cache"))
    spoil(tmp_path / "cache")
    with pytest.raises(UserError, match=sentence):
        LatentCache(str(tmp_path / "cache"))


# ---------------------------------------------------------------- which VAE

def test_the_cache_of_another_vae_is_refused(extract, few_images, vae_folder, tmp_path):
    """Both named. Another decoder alone is no other VAE: the paper's two differ in it."""
    extract(few_images, tmp_path / "cache")
    cache = LatentCache(str(tmp_path / "cache"))
    for vae, reason in ((other_vae(vae_folder, tmp_path), "another VAE .*"), ("none", ""),
                        ("/nowhere", r"there is no such folder.*")):
        with pytest.raises(ArgumentError, match=rf"--vae {vae}: {reason}the cache .* made with {vae_folder}|"
                                                rf"--vae {vae}: {reason}The cache .* made with {vae_folder}"):
            load_cached_latents(cache, vae=str(vae))
    with pytest.raises(ArgumentError, match=r"scale=0\.25.*scale=0\.5"):
        load_cached_latents(cache, vae=str(other_vae(vae_folder, tmp_path, scaling_factor=0.25)))
    with pytest.raises(ArgumentError, match=r"--image-size 64: .* of images of 32 pixels"):
        load_cached_latents(cache, image_size=64)
    other_decoder = str(other_vae(vae_folder, tmp_path, part="decoder"))
    assert load_cached_latents(cache, other_decoder, 32, needs_decoder=True).name == other_decoder


def test_nothing_is_loaded_unless_it_decodes(extract, few_images, vae_folder, tmp_path):
    """Nothing is loaded where nothing is decoded; the VAE's folder may be gone."""
    shutil.copytree(vae_folder, tmp_path / "vae")
    extract(few_images, tmp_path / "cache", "--vae", tmp_path / "vae")
    shutil.rmtree(tmp_path / "vae")
    cache = LatentCache(str(tmp_path / "cache"))
    autoencoder = load_cached_latents(cache)
    assert autoencoder.vae is None and autoencoder.name == str(tmp_path / "vae")
    assert (autoencoder.channels, autoencoder.stride) == (4, 4)
    with pytest.raises(ArgumentError, match="If it was moved, pass its new place") as caught:
        load_cached_latents(cache, needs_decoder=True)
    assert set(caught.value.arguments) == {"vae"}


def test_pixels_are_not_cached(command, few_images, tmp_path):
    status, _, err = command("extract_features", "--data-path", few_images, "--features-path", tmp_path / "cache",
                             "--image-size", SIZE, "--vae", "none")
    assert status == 2 and "--vae none: without a VAE there is nothing to encode" in err
    status, _, err = command("extract_features", "--features-path", tmp_path / "cache")
    assert status == 2 and "--data-path: missing" in err
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- reading

def test_copy_on_the_device_gives_the_same_batches(extract, few_images, tmp_path, monkeypatch):
    """--features-in-memory: every item, mirrored or not, over several files."""
    small_files(monkeypatch)
    for dtype in ("fp16", "bf16"):
        extract(few_images, tmp_path / dtype, "--dtype", dtype)
        cache = LatentCache(str(tmp_path / dtype))
        loaded = cache.to_device("cpu")
        keys = [(i, flip) for i in (12, 3, 0, 5, 4) for flip in (True, False)]
        want, got = cache.__getitems__(keys), loaded.__getitems__(keys)
        assert torch.equal(want.images, got.images) and torch.equal(want.cond["y"], got.cond["y"])
        assert len(loaded) == 13 and loaded.on_device and not cache.on_device


def test_cache_that_does_not_fit_on_the_device_is_refused(extract, few_images, tmp_path, monkeypatch):
    extract(few_images, tmp_path / "cache")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ArgumentError, match=r"takes 0\.03 MB, cpu has 0\.00 MB free") as caught:
        LatentCache(str(tmp_path / "cache")).to_device("cpu")
    assert set(caught.value.arguments) == {"cache_on_device"}


def test_file_that_is_cut_short_while_it_is_read_is_an_error(extract, few_images, tmp_path):
    extract(few_images, tmp_path / "cache")
    cache = LatentCache(str(tmp_path / "cache"))
    path = tmp_path / "cache" / "moments-000.npy"
    os.truncate(path, path.stat().st_size // 2)
    cache.__getitems__([(0, False)])
    with pytest.raises(UserError, match=r"moments-000\.npy was cut short"):
        cache.__getitems__([(12, False)])


def test_workers_may_be_spawned(extract, few_images, tmp_path):
    """A pickled copy opens the files again."""
    extract(few_images, tmp_path / "cache")
    cache = LatentCache(str(tmp_path / "cache"))
    want = cache.__getitems__([(5, True)]).images
    assert torch.equal(pickle.loads(pickle.dumps(cache)).__getitems__([(5, True)]).images, want)


def test_memory_does_not_grow_with_the_cache(few_images, tmp_path):
    """A cache of 100 MB is read to the end, and this process holds none of it."""
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


def test_progress_marks_corrupt_images(extract, spoilt_images, tmp_path):
    extract(spoilt_images, tmp_path / "cache", "--max-bad-images", 2, fails=True)
    assert np.load(tmp_path / "cache" / "progress.npy").tolist() == [1, CORRUPT, CORRUPT, *[1] * 9, CORRUPT]
