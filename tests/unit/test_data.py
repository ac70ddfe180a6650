"""Training images, and the order in which they are seen."""
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import build_dataset
from data.corrupt_images import CorruptImage, CorruptImageLog
from data.digits import DigitsDataset
from data.image_folder import ImageFolderDataset
from data.image_io import to_uint8
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from evaluation.digits_classifier import DigitsClassifier
from helpers import picture, write_images

CPU = torch.device("cpu")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# ---------------------------------------------------------------- folders of images

def test_items_of_a_folder(tmp_path):
    """Values, labels by the classes' names, mirror images."""
    names = ["cat/1.png", "cat/2.png", "ant/1.png"]
    pixels = {name: picture(8, 8, 3, seed=i) for i, name in enumerate(names)}
    data = ImageFolderDataset(write_images(tmp_path, {name: Image.fromarray(p) for name, p in pixels.items()}), 8)
    assert data.class_names == ["ant", "cat"] and len(data) == 3
    assert (data.channels, data.flips) == (3, True)
    assert data.paths == ["ant/1.png", "cat/1.png", "cat/2.png"] and data.labels == [0, 1, 1]
    expected = [((pixels[name].transpose(2, 0, 1) / 255 - 0.5) / 0.5).astype(np.float32) for name in data.paths]
    images, labels, bad = data.__getitems__([(1, False), (0, True), (2, True), (1, True)])
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and bad == []
    assert labels.tolist() == [1, 0, 1, 1]
    for image, index, step in zip(images, [1, 0, 2, 1], [1, -1, -1, -1]):
        np.testing.assert_allclose(image.numpy(), expected[index][..., ::step], atol=1e-6)


def test_black_and_white_are_the_ends(tmp_path):
    halves = np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0)
    image = ImageFolderDataset(write_images(tmp_path, {"a/1.png": Image.fromarray(halves)}), 2).read(0)
    assert torch.equal(image, torch.tensor([-1.0, 1.0]).expand(3, 2, 2))


def test_examples_come_from_all_over(tmp_path):
    """Each of another place; what cannot be read is left out; no more than there are."""
    files = {f"a/{i}.png": Image.new("RGB", (2, 2), (i, i, i)) for i in range(9)}
    data = ImageFolderDataset(write_images(tmp_path, files | {"a/4.png": b"no image"}), 2)
    assert [round((image[0, 0, 0].item() + 1) * 127.5) for image in data.examples(5)] == [0, 2, 6, 8]
    assert len(data.examples(100)) == 8
    nothing = ImageFolderDataset(write_images(tmp_path / "nothing", {"a/1.png": b""}), 2)
    assert nothing.examples(5) is None


def test_a_folder_that_is_none(tmp_path):
    picture_of_a_cat = Image.fromarray(picture(8, 8, 3))
    flat = write_images(tmp_path / "flat", {"1.png": picture_of_a_cat})
    half = write_images(tmp_path / "half", {"cat/1.png": picture_of_a_cat, "dog/notes.txt": b"none yet"})
    for root in (str(tmp_path / "missing"), flat, flat + "/1.png", half):
        with pytest.raises(UserError, match=f"--data-path {root}: "):
            build_dataset(root, 8)
    with pytest.raises(UserError, match="dog"):
        build_dataset(half, 8)


# ---------------------------------------------------------------- loading

def pairs(data, steps):
    return StepBatchSampler(len(data), 2, slice(0, 2), seed=0, first=0, last=steps, flips=True)


def never(bad):
    raise AssertionError(bad)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_loaded_in_order(tmp_path, workers):
    """In the order of the batches, however many workers."""
    files = {f"{i % 2}/{i}.png": Image.fromarray(picture(8, 8, 3, seed=i)) for i in range(6)}
    data = ImageFolderDataset(write_images(tmp_path, files), 8)
    batches = pairs(data, steps=5)
    loaded = list(PrefetchLoader(data, batches, workers, CPU, never))
    assert len(loaded) == len(batches) == 5
    for (images, labels), keys in zip(loaded, batches):
        want = data.__getitems__(keys)
        assert torch.equal(images, want.images) and torch.equal(labels, want.labels)


# ---------------------------------------------------------------- images that cannot be read

def numbered(tmp_path, bad, count=6, limit=0):
    """Images whose grey value is their index, class i % 2 in the order 0, 2, 4, 1, 3, 5; some of them are none."""
    files = {f"{i % 2}/{i}.png": b"no image" if i in bad else Image.new("RGB", (2, 2), (i, i, i)) for i in range(count)}
    return ImageFolderDataset(write_images(tmp_path, files), 2, max_bad_images=limit)


def values(batch):
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_a_bad_image_is_replaced_by_the_next(tmp_path):
    """With its label; over several in a row, and over the end of the data set."""
    data = numbered(tmp_path, bad=[2, 4, 5], limit=3)
    batch = data.__getitems__([(index, False) for index in range(6)])
    assert values(batch) == [0, 1, 1, 1, 3, 0] and batch.labels.tolist() == [0, 1, 1, 1, 1, 0]
    assert [image.path for image in batch.bad] == [str(tmp_path / name) for name in ("0/2.png", "0/4.png", "1/5.png")]


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_bad_images_give_up_the_batch(tmp_path, limit):
    batch = numbered(tmp_path, bad=[2, 4], limit=limit).__getitems__([(0, False), (1, False)])
    assert batch.images is None and len(batch.bad) == limit + 1


def test_nothing_but_bad_images(tmp_path):
    """Also where all of them are allowed, the search for a good one ends."""
    batch = numbered(tmp_path, bad=range(6), limit=100).__getitems__([(3, False)])
    assert batch.images is None and len(batch.bad) == 6


@forks
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image",
], ids=["truncated", "empty", "garbage"])
def test_a_broken_image_is_named(tmp_path, workers, damage):
    """In a sentence, not in a worker's traceback."""
    names = [f"cat/{i}.png" for i in range(4)]
    root = write_images(tmp_path, {name: Image.fromarray(picture(8, 8, 3)) for name in names})
    bad = tmp_path / names[2]
    bad.write_bytes(damage(bad.read_bytes()))
    data = ImageFolderDataset(root, 8)
    on_bad = CorruptImageLog(0, str(tmp_path / "bad.txt"), never).add
    with pytest.raises(UserError, match=str(bad)) as caught:
        list(PrefetchLoader(data, pairs(data, steps=2), workers, CPU, on_bad))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert "--max-bad-images" in str(caught.value)


def bad(name, **more):
    return CorruptImage(name, "OSError: half of it", **more)


def test_bad_images_are_counted_once(tmp_path):
    """However often they come by; listed with their reasons; the one beyond the limit ends the run."""
    heard = []
    images = CorruptImageLog(2, str(tmp_path / "bad.txt"), heard.append)
    images.add([bad("a"), bad("a")])
    images.add([bad("a"), bad("b c")])
    assert (tmp_path / "bad.txt").read_text() == "a\tOSError: half of it\nb c\tOSError: half of it\n"
    assert len(heard) == 2 and "2 of 2" in heard[1]
    with pytest.raises(UserError, match=r"cannot read the image d .*number 3 in all; --max-bad-images 2 allows"):
        images.add([bad("d")])


def test_processes_and_restarts_count_together(tmp_path):
    first, second = (CorruptImageLog(2, str(tmp_path / "bad.txt"), lambda line: None) for _ in range(2))
    first.add([bad("a")])
    second.add([bad("a"), bad("b")])
    for images in (first, second):
        with pytest.raises(UserError, match="the image c"):
            images.add([bad("c")])


def test_a_disk_that_fails_is_no_bad_image(tmp_path):
    """A file that cannot be opened may be there the next time: it is never replaced, whatever the limit."""
    data = numbered(tmp_path, bad=[], limit=5)
    (tmp_path / "0" / "2.png").unlink()
    batch = data.__getitems__([(1, False)])
    assert batch.images is None
    with pytest.raises(UserError, match=r"cannot read \S+2\.png \(FileNotFoundError"):
        CorruptImageLog(5, str(tmp_path / "bad.txt"), never).add(batch.bad)


# ---------------------------------------------------------------- the order

def batches(first=0, last=30, rows=slice(0, 4), seed=0, flips=True, items=23):
    return list(StepBatchSampler(items, 4, rows, seed, first, last, flips))


def seen(batches):
    return [index for batch in batches for index, _ in batch]


def test_an_epoch_shows_no_item_twice():
    """23 items, 4 a batch: 5 steps an epoch, whose 20 items differ, and not by the same order each time."""
    steps = batches()
    epochs = [seen(steps[i:i + 5]) for i in range(0, 30, 5)]
    assert all(len(batch) == 4 for batch in steps)
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(23))
    assert sorted(seen(batches(last=5, items=20))) == list(range(20))


def test_a_restart_goes_on_in_the_middle():
    whole = batches()
    for first in (1, 5, 13):
        assert batches(first=first) == whole[first:]
    assert batches(last=13) == whole[:13]


def test_processes_share_the_batch_of_one():
    whole, halves = batches(), [batches(rows=slice(0, 2)), batches(rows=slice(2, 4))]
    assert [one + two for one, two in zip(*halves)] == whole


def test_seeds_differ():
    assert batches(seed=0) != batches(seed=1)
    assert seen(batches(seed=0)) != seen(batches(seed=1))


def test_flips():
    """Half of them, drawn anew each epoch and for each place in the batch; or none, in the same order."""
    flipped = np.array([[flip for _, flip in batch] for batch in batches(last=1000)])
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert (abs(flipped.mean(axis=0) - 0.5) < 5 * 0.5 / 1000**0.5).all()
    assert abs((flipped[:, 0] == flipped[:, 1]).mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert abs((flipped[:-5] == flipped[5:]).mean() - 0.5) < 5 * 0.5 / 3980**0.5
    without = batches(flips=False)
    assert not any(flip for batch in without for _, flip in batch)
    assert seen(without) == seen(batches())


def test_length():
    assert len(StepBatchSampler(23, 4, slice(0, 4), 0, 3, 30, True)) == 27 == len(batches(first=3))


# ---------------------------------------------------------------- digits

def test_digits_are_split_without_overlap():
    train, held_out = DigitsDataset("train"), DigitsDataset("held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    pictures = [{image.numpy().tobytes() for image in split.images} for split in (train, held_out)]
    assert not pictures[0] & pictures[1]
    for split in (train, held_out):
        images, labels, bad = split.__getitems__([(3, False), (3, True)])
        assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32 and not bad
        assert labels.tolist() == [split.labels[3]] * 2 and torch.equal(images[1], images[0].flip(2))
        assert len(split.paths) == len(set(split.paths)) == len(split)
        assert split.images.min() == -1 and split.images.max() == 1
        assert split.class_names == [str(i) for i in range(10)] and set(split.labels) == set(range(10))
    assert (DigitsDataset.channels, DigitsDataset.flips) == (1, False)


def test_digits_by_name():
    assert isinstance(build_dataset("digits", 8), DigitsDataset)
    with pytest.raises(UserError, match=r"--image-size 16.*--image-size 8"):
        build_dataset("digits", 16)


def test_the_classifier_judges_samples():
    """Real digits that went the way of samples are as good as real ones; wrong labels are not."""
    classifier, real = DigitsClassifier(), DigitsDataset("held-out")
    labels = np.array(real.labels)
    assert 0.97 < classifier.accuracy < 1
    images = to_uint8(real.images).numpy()
    assert classifier.agreement(images, labels) == pytest.approx(classifier.accuracy, abs=0.01)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert classifier.agreement(images, shuffled) == pytest.approx(0.1, abs=5 * (0.09 / len(labels)) ** 0.5)
