"""Data sets, their order, and loading."""
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ArgumentError, UserError
from data import build_dataset
from data.corrupt_images import CorruptImage, CorruptImageLog
from data.digits import DigitsDataset
from data.image_folder import ImageFolderDataset, list_image_folder
from data.image_io import to_uint8
from data.loader import PrefetchLoader
from data.path_list import PathList
from data.sampler import StepBatchSampler
from evaluation.digits_classifier import DigitsClassifier
from helpers import raises_argument
from run_files import picture, write_images

CPU = torch.device("cpu")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_folder_items_have_pixels_labels_and_mirror_images(tmp_path):
    names = ["cat/1.png", "cat/2.png", "ant/1.png"]
    pixels = {name: picture(8, 8, 3, seed=i) for i, name in enumerate(names)}
    data = ImageFolderDataset(write_images(tmp_path, {name: Image.fromarray(p) for name, p in pixels.items()}), 8)
    assert data.class_names == ["ant", "cat"] and len(data) == 3
    assert (data.channels, data.flips) == (3, True)
    assert list(data.paths) == ["ant/1.png", "cat/1.png", "cat/2.png"] and data.labels.tolist() == [0, 1, 1]
    expected = [((pixels[name].transpose(2, 0, 1) / 255 - 0.5) / 0.5).astype(np.float32) for name in data.paths]
    images, cond, corrupt = data.__getitems__([(1, False), (0, True), (2, True), (1, True)])
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and corrupt == []
    assert cond["y"].tolist() == [1, 0, 1, 1] and cond["y"].dtype == torch.int64
    for image, index, step in zip(images, [1, 0, 2, 1], [1, -1, -1, -1]):
        np.testing.assert_allclose(image.numpy(), expected[index][..., ::step], atol=1e-6)


def test_black_and_white_are_minus_one_and_one(tmp_path):
    halves = np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0)
    image = ImageFolderDataset(write_images(tmp_path, {"a/1.png": Image.fromarray(halves)}), 2).read(0)
    assert torch.equal(image, torch.tensor([-1.0, 1.0]).expand(3, 2, 2))


def test_examples_are_evenly_spaced_and_readable(tmp_path):
    files = {f"a/{i}.png": Image.new("RGB", (2, 2), (i, i, i)) for i in range(9)}
    data = ImageFolderDataset(write_images(tmp_path, files | {"a/4.png": b"no image"}), 2)
    assert [round((image[0, 0, 0].item() + 1) * 127.5) for image in data.examples(5)] == [0, 2, 6, 8]
    assert len(data.examples(100)) == 8
    nothing = ImageFolderDataset(write_images(tmp_path / "nothing", {"a/1.png": b""}), 2)
    assert nothing.examples(5) is None


def test_folder_without_classes_or_images_is_refused(tmp_path):
    picture_of_a_cat = Image.fromarray(picture(8, 8, 3))
    flat = write_images(tmp_path / "flat", {"1.png": picture_of_a_cat})
    half = write_images(tmp_path / "half", {"cat/1.png": picture_of_a_cat, "dog/notes.txt": b"none yet"})
    for root in (str(tmp_path / "missing"), flat, flat + "/1.png", half):
        with raises_argument(data_path=root):
            build_dataset(root, 8)
    with pytest.raises(ArgumentError, match="dog"):
        build_dataset(half, 8)


def test_listing_is_that_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder
    root = tmp_path / "data"
    for name in ("b/2.png", "b/10.PNG", "b/1.jpeg", "b/a.txt", "b/z/1.webp", "b/a/1.bmp", "b/a-1/x.tif", "B/1.ppm",
                 "a b/\u00e9.jpg", "10/1.png", "9/1.pgm", "c/deep/er/1.tiff", "note.png", "../one/b.png",
                 "../two/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    open(os.path.join(os.fsencode(root), b"9", b"\xff.png"), "w").close()  # not UTF-8
    (root / "c" / "linked").symlink_to(tmp_path / "one", target_is_directory=True)
    (root / "d").symlink_to(tmp_path / "two", target_is_directory=True)
    (root / "c" / "dangling.png").symlink_to("nowhere")
    expected = ImageFolder(str(root))
    for path in (str(root), f"{root}/", os.path.relpath(root)):
        class_names, labels, paths, _ = list_image_folder(path)
        assert class_names == expected.classes and labels.tolist() == expected.targets and labels.dtype == np.int64
        assert [os.path.join(root, name) for name in paths] == [path for path, _ in expected.samples]


def test_path_list_is_a_sequence_of_strings():
    names = ["a/1.png", "", "\u00e9/\udcff.png", "b" * 300]
    paths = PathList(names)
    assert list(paths) == names and len(paths) == 4 and paths[-1] == names[3] and names[2] in paths
    assert list(pickle.loads(pickle.dumps(paths))) == names
    with pytest.raises(IndexError):
        paths[4]
    paths.extend(["c"])
    assert list(paths) == [*names, "c"]


def pairs(data, steps):
    return StepBatchSampler(len(data), 2, slice(0, 2), seed=0, start_step=0, end_step=steps, flips=True)


def never(images):
    raise AssertionError(images)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order_of_batches(tmp_path, workers):
    files = {f"{i % 2}/{i}.png": Image.fromarray(picture(8, 8, 3, seed=i)) for i in range(6)}
    data = ImageFolderDataset(write_images(tmp_path, files), 8)
    batches = pairs(data, steps=5)
    loaded = list(PrefetchLoader(data, batches, workers, CPU, never))
    assert len(loaded) == len(batches) == 5
    for (images, cond), keys in zip(loaded, batches):
        want = data.__getitems__(keys)
        assert torch.equal(images, want.images) and torch.equal(cond["y"], want.cond["y"])


def numbered(tmp_path, bad, count=6, limit=0):
    """Images whose grey value is their index, class i % 2 in the order 0, 2, 4, 1, 3, 5; some of them are none."""
    files = {f"{i % 2}/{i}.png": b"no image" if i in bad else Image.new("RGB", (2, 2), (i, i, i)) for i in range(count)}
    return ImageFolderDataset(write_images(tmp_path, files), 2, max_bad_images=limit)


def values(batch):
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_corrupt_image_is_replaced_by_a_good_one_with_its_label(tmp_path):
    """Also if the first choice is corrupt too."""
    data = numbered(tmp_path, bad=[2, 4, 5], limit=3)
    batch = data.__getitems__([(index, False) for index in range(6)])
    assert values(batch) == [0, 1, 1, 1, 3, 1] and batch.cond["y"].tolist() == [0, 1, 1, 1, 1, 1]
    names = ("0/2.png", "0/4.png", "1/5.png")
    assert {image.path for image in batch.corrupt} == {str(tmp_path / name) for name in names}


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_corrupt_images_end_the_batch(tmp_path, limit):
    batch = numbered(tmp_path, bad=[2, 4], limit=limit).__getitems__([(1, False), (2, False)])
    assert batch.images is None and len(batch.corrupt) == limit + 1


def test_search_for_a_good_image_ends_if_there_is_none(tmp_path):
    batch = numbered(tmp_path, bad=range(6), limit=100).__getitems__([(3, False)])
    assert batch.images is None and len(batch.corrupt) == 6


@forks
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image",
], ids=["truncated", "empty", "garbage"])
def test_corrupt_image_is_named_without_a_traceback(tmp_path, workers, damage):
    names = [f"cat/{i}.png" for i in range(4)]
    root = write_images(tmp_path, {name: Image.fromarray(picture(8, 8, 3)) for name in names})
    bad = tmp_path / names[2]
    bad.write_bytes(damage(bad.read_bytes()))
    data = ImageFolderDataset(root, 8)
    on_corrupt = CorruptImageLog(0, str(tmp_path / "bad.txt"), never).add
    with pytest.raises(UserError, match=str(bad)) as caught:
        list(PrefetchLoader(data, pairs(data, steps=2), workers, CPU, on_corrupt))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert "--max-bad-images" in str(caught.value)


def bad(name, **more):
    return CorruptImage(name, "OSError: half of it", **more)


def test_corrupt_images_are_counted_once(tmp_path):
    warnings = []
    images = CorruptImageLog(2, str(tmp_path / "bad.txt"), warnings.append)
    images.add([bad("a"), bad("a")])
    images.add([bad("a"), bad("b c")])
    assert (tmp_path / "bad.txt").read_text() == "a\tOSError: half of it\nb c\tOSError: half of it\n"
    assert len(warnings) == 2 and "2 of 2" in warnings[1]
    with pytest.raises(UserError, match=r"--max-bad-images 2: cannot read the image d .*number 3 in all"):
        images.add([bad("d")])


def test_ranks_and_restarts_share_the_log_of_corrupt_images(tmp_path):
    first, second = (CorruptImageLog(2, str(tmp_path / "bad.txt"), lambda line: None) for _ in range(2))
    first.add([bad("a")])
    second.add([bad("a"), bad("b")])
    for images in (first, second):
        with pytest.raises(UserError, match="the image c"):
            images.add([bad("c")])


def test_unreadable_file_is_never_replaced(tmp_path):
    data = numbered(tmp_path, bad=[], limit=5)
    (tmp_path / "0" / "2.png").unlink()
    batch = data.__getitems__([(1, False)])
    assert batch.images is None
    with pytest.raises(UserError, match=r"cannot read \S+2\.png \(FileNotFoundError"):
        CorruptImageLog(5, str(tmp_path / "bad.txt"), never).add(batch.corrupt)


def batches(start_step=0, end_step=30, rows=slice(0, 4), seed=0, flips=True, items=23):
    return list(StepBatchSampler(items, 4, rows, seed, start_step, end_step, flips))


def seen(batches):
    return [index for batch in batches for index, _ in batch]


def test_epoch_is_a_permutation():
    """23 items in batches of 4: 5 steps an epoch, with 20 different items in another order each time."""
    steps = batches()
    epochs = [seen(steps[i:i + 5]) for i in range(0, 30, 5)]
    assert all(len(batch) == 4 for batch in steps)
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(23))
    assert sorted(seen(batches(end_step=5, items=20))) == list(range(20))


def test_order_depends_on_the_step_and_the_seed_alone():
    full = batches()
    for step in (1, 5, 13):
        assert batches(start_step=step) == full[step:]
        assert len(StepBatchSampler(23, 4, slice(0, 4), 0, step, 30, True)) == 30 - step
    assert batches(end_step=13) == full[:13]
    assert batches(seed=1) != full and seen(batches(seed=1)) != seen(full)


def test_ranks_divide_the_global_batch():
    full, halves = batches(), [batches(rows=slice(0, 2)), batches(rows=slice(2, 4))]
    assert [one + two for one, two in zip(*halves)] == full


def test_flips_are_independent_with_probability_one_half():
    flipped = np.array([[flip for _, flip in batch] for batch in batches(end_step=1000)])
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert (abs(flipped.mean(axis=0) - 0.5) < 5 * 0.5 / 1000**0.5).all()
    assert abs((flipped[:, 0] == flipped[:, 1]).mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert abs((flipped[:-5] == flipped[5:]).mean() - 0.5) < 5 * 0.5 / 3980**0.5
    without = batches(flips=False)
    assert not any(flip for batch in without for _, flip in batch)
    assert seen(without) == seen(batches())


def test_digits_are_split_without_overlap():
    train, held_out = DigitsDataset("train"), DigitsDataset("held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    pictures = [{image.numpy().tobytes() for image in split.images} for split in (train, held_out)]
    assert not pictures[0] & pictures[1]
    for split in (train, held_out):
        images, cond, corrupt = split.__getitems__([(3, False), (3, True)])
        assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32 and not corrupt
        assert cond["y"].tolist() == [split.labels[3]] * 2 and torch.equal(images[1], images[0].flip(2))
        assert len(split.paths) == len(set(split.paths)) == len(split)
        assert split.images.min() == -1 and split.images.max() == 1
        assert split.class_names == [str(i) for i in range(10)] and set(split.labels) == set(range(10))
    assert (DigitsDataset.channels, DigitsDataset.flips) == (1, False)


def test_digits_have_one_size():
    assert isinstance(build_dataset("digits", 8), DigitsDataset)
    with pytest.raises(ArgumentError, match=r"--image-size 16.* 8 pixels"):
        build_dataset("digits", 16)


def test_digits_classifier_judges_samples():
    classifier, real = DigitsClassifier(), DigitsDataset("held-out")
    labels = np.array(real.labels)
    assert 0.97 < classifier.accuracy < 1
    images = to_uint8(real.images).numpy()
    assert classifier.agreement(images, labels) == pytest.approx(classifier.accuracy, abs=0.01)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert classifier.agreement(images, shuffled) == pytest.approx(0.1, abs=5 * (0.09 / len(labels)) ** 0.5)
