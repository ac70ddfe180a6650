"""A set of samples on disk: every image once, whichever rank makes it, and after any kill."""
import json
import os

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.files import sha256_file
from sampling.sample_set import SampleSet, sample_labels


def image(i):
    return np.random.default_rng(i).integers(0, 256, (2, 3, 3), dtype=np.uint8)


def make(samples, ranges):
    """Make some ranges of a set in which sample i is `image(i)` with the label 7 i."""
    for start, end in ranges:
        samples.add(start, np.stack([image(i) for i in range(start, end)]), 7 * np.arange(start, end))


def finish(samples, count, batch_size):
    make(samples, samples.missing(count, batch_size))
    samples.assemble(count)


def check(samples, count):
    """Assert that the .npz is complete, as numpy reads it."""
    with np.load(samples.npz) as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype) == ((count, 2, 3, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert np.array_equal(images, np.stack([image(i) for i in range(count)]))
    assert np.array_equal(labels, 7 * np.arange(count))
    assert samples.num_finished() == count
    assert not os.path.exists(samples.parts)


@pytest.fixture
def samples(tmp_path):
    return SampleSet(str(tmp_path / "samples" / "DiT"))


@pytest.mark.parametrize("ranges, count", [
    ([(8, 10), (0, 4), (4, 8)], 10),
    ([(0, 600), (600, 601)], 601),  # larger than the block that is copied
    ([(0, 4), (2, 7), (3, 5), (4, 8), (6, 10)], 10),  # two runs with different batch sizes may have written them
], ids=["in any order", "large", "overlapping"])
def test_parts_are_assembled_to_a_set_with_each_image_once(samples, ranges, count):
    assert samples.num_finished() == 0 and samples.missing(10, 4) == [(0, 4), (4, 8), (8, 10)]
    make(samples, ranges)
    assert samples.missing(count, 5) == []
    samples.assemble(count)
    check(samples, count)


def test_parts_are_in_the_order_of_their_numbers(samples):
    """Not of their names, which get another digit past ten million."""
    small = np.zeros((1, 1, 1, 3), np.uint8)
    for i in (0, 9_999_999, 10_000_000):
        samples.add(i, small, np.array([i]))
    assert [start for start, *_ in samples._list_parts()] == [0, 9_999_999, 10_000_000]


def test_finished_parts_are_not_made_again(samples):
    make(samples, [(4, 8)])
    assert samples.missing(10, 4) == [(0, 4), (8, 10)]
    assert samples.missing(10, 3) == [(0, 3), (3, 4), (8, 9), (9, 10)]
    assert samples.missing(10, 100) == [(0, 4), (8, 10)]
    assert samples.missing(6, 4) == [(0, 4)]
    finish(samples, 10, batch_size=3)
    check(samples, 10)


def test_a_finished_set_is_the_beginning_of_a_larger_one(samples):
    finish(samples, 5, batch_size=4)
    check(samples, 5)
    assert samples.missing(5, 4) == samples.missing(3, 4) == []
    assert samples.missing(10, 4) == [(5, 8), (8, 10)]
    finish(samples, 10, batch_size=4)
    check(samples, 10)


def test_parts_beyond_the_set_are_kept_for_a_larger_one(samples):
    make(samples, [(0, 4), (4, 8), (8, 12)])
    assert samples.assemble(6) == 6
    with np.load(samples.npz) as arrays:
        assert np.array_equal(arrays["arr_0"], np.stack([image(i) for i in range(6)]))
    assert samples.missing(12, 4) == []
    assert samples.assemble(12) == samples.assemble(3) == 12
    check(samples, 12)


def test_temporary_files_of_a_killed_run_do_not_count(samples):
    make(samples, [(0, 4)])
    for name in ("0000004-0000008.npz.77.tmp", "0000004-0000008.npz.tmp"):
        with open(os.path.join(samples.parts, name), "wb") as file:
            file.write(b"half")
    with open(samples.npz + ".77.tmp", "wb") as file:
        file.write(b"half")
    assert samples.missing(8, 4) == [(4, 8)]
    finish(samples, 8, batch_size=4)
    check(samples, 8)


@pytest.mark.parametrize("there", [[(4, 8)], [(0, 4)], [(0, 2), (4, 8)], []], ids=["start", "end", "middle", "all"])
def test_a_set_with_a_gap_is_not_written(samples, there):
    """Missing parts may lie on the disk of another machine."""
    make(samples, there)
    with pytest.raises(UserError, match=samples.folder):
        samples.assemble(8)
    assert not os.path.exists(samples.npz)
    assert samples.missing(8, 4) != []


def test_a_failed_write_leaves_nothing(samples, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"0000000-0000004\.npz.*No space"):
        make(samples, [(0, 4)])
    assert os.listdir(samples.parts) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        make(SampleSet(str(tmp_path / "file" / "DiT")), [(0, 4)])


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-1], lambda raw: b"",
                                    lambda raw: b"garbage"], ids=["half", "end", "empty", "garbage"])
def test_a_damaged_file_is_an_error(samples, damage):
    finish(samples, 5, batch_size=4)
    with open(samples.npz, "rb") as file:
        raw = file.read()
    with open(samples.npz, "wb") as file:
        file.write(damage(raw))
    for use in (samples.num_finished, lambda: samples.missing(10, 4), lambda: samples.write_pngs(5, 0, 1)):
        with pytest.raises(UserError, match=rf"{samples.npz} is damaged"):
            use()


@pytest.mark.parametrize("write, reason", [
    (lambda path: np.savez(path, images=np.zeros(3)), "arr_0"),
    (lambda path: np.savez(path, arr_0=np.array([None])), "not a plain array"),
])
def test_an_npz_of_something_else_is_an_error(samples, write, reason):
    os.makedirs(os.path.dirname(samples.npz))
    write(samples.npz)
    with pytest.raises(UserError, match=f"{samples.npz}.*{reason}"):
        samples.num_finished()


def test_random_labels_are_a_function_of_seed_and_sample():
    labels = sample_labels("uniform", 3, range(2000), 10)
    assert labels.dtype == np.int64
    assert np.array_equal(sample_labels("uniform", 3, [1500, 7], 10), labels[[1500, 7]])
    assert not np.array_equal(sample_labels("uniform", 4, range(2000), 10), labels)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and abs(counts - 200).max() < 5 * (2000 * 0.09) ** 0.5


def test_ranks_share_the_pngs_and_keep_existing_ones(samples):
    finish(samples, 5, batch_size=4)
    samples.write_pngs(5, rank=0, world_size=2)
    assert sorted(os.listdir(samples.folder)) == ["000000.png", "000002.png", "000004.png"]
    kept = os.path.join(samples.folder, "000003.png")
    Image.fromarray(image(99)).save(kept)
    samples.write_pngs(5, rank=1, world_size=2)
    assert sorted(os.listdir(samples.folder)) == [f"{i:06d}.png" for i in range(5)]
    for i in range(5):
        with Image.open(os.path.join(samples.folder, f"{i:06d}.png")) as picture:
            assert np.array_equal(picture, image(99 if i == 3 else i))


def test_balanced_labels_repeat_all_classes():
    assert sample_labels("balanced", 0, range(5, 12), 3).tolist() == [2, 0, 1, 2, 0, 1, 2]


def test_metadata_is_written_once_for_an_npz(samples):
    """The record of a set that exists describes how it was made, not the latest command."""
    finish(samples, 5, batch_size=4)
    for number in (1, 2):
        samples.write_metadata(dict(command=number))
    with open(samples.folder + ".json") as file:
        assert json.load(file)["command"] == 1
    finish(samples, 6, batch_size=4)
    samples.write_metadata(dict(command=3))
    with open(samples.folder + ".json") as file:
        metadata = json.load(file)
    assert metadata == dict(command=3, sha256=sha256_file(samples.npz))
