"""Training images, and the order in which they are seen."""
import numpy as np
import pytest
import torch
from PIL import Image

from runtime.data import GlobalBatches, ImageFolderData, center_crop, load_batches, open_data
from runtime.digits import DigitsClassifier, DigitsData
from runtime.errors import UserError
from runtime.generate import to_uint8

CPU = torch.device("cpu")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def picture(*shape, seed=0):
    """(H, W, ...) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(root, files):
    """files: {"class/name.png": PIL image or bytes}."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return str(root)


# ---------------------------------------------------------------- center_crop

@pytest.mark.parametrize("width, height", [(8, 8), (9, 8), (5, 3), (3, 5), (15, 40), (40, 15), (16, 16),
                                           (100, 33)])
def test_crop_has_the_size(width, height):
    assert center_crop(Image.fromarray(picture(height, width, 3)), 8).size == (8, 8)


def test_crop_of_an_image_of_the_size_is_the_image():
    pixels = picture(8, 8, 3)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels)


@pytest.mark.parametrize("portrait", [False, True])
def test_crop_takes_the_centre_of_a_halved_image(portrait):
    """40 x 20 to 10: halved to 20 x 10 (a ramp of 2x becomes 4x + 1), of which columns 5 .. 14 are kept."""
    ramp = np.tile(2 * np.arange(40, dtype=np.uint8), (20, 1))
    expected = np.tile(4 * np.arange(5, 15, dtype=np.uint8) + 1, (10, 1))
    cropped = np.array(center_crop(Image.fromarray(ramp.T if portrait else ramp), 10))
    assert np.array_equal(cropped, expected.T if portrait else expected)


@pytest.mark.parametrize("size", [12, 24, 30])
def test_crop_takes_the_centre_of_a_scaled_image(size):
    """A ramp's mean stays where it is, and its slope follows the scale: also where the image is enlarged."""
    ramp = Image.fromarray(np.tile(4 * np.arange(60, dtype=np.uint8), (18, 1)))
    cropped = np.array(center_crop(ramp, size)).astype(float)
    assert cropped.mean() == pytest.approx(4 * 29.5, abs=1.5)
    assert (cropped[:, -1] - cropped[:, 0]).mean() == pytest.approx(4 * 18 * (size - 1) / size, abs=3)


def test_crop_of_an_odd_remainder():
    """Three columns too many: one goes on the left, two on the right."""
    pixels = picture(8, 11, 3)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels[:, 1:9])


def test_crop_halves_by_box_means():
    """Four times as large: each pixel is the mean of its block, exactly; no bicubic step could do that."""
    means = np.random.default_rng(0).integers(10, 246, (8, 8))
    within = np.kron([[-8, 4], [8, -4]], np.ones((2, 2), int))
    blocks = np.kron(means, np.ones((4, 4), int)) + np.tile(within, (8, 8))
    assert np.array_equal(center_crop(Image.fromarray(blocks.astype(np.uint8)), 8), means)


def test_crop_halves_only_while_twice_as_large():
    def bicubic(image):
        return np.array(image.resize((8, 8), Image.Resampling.BICUBIC))

    once, not_quite = Image.fromarray(picture(24, 24)), Image.fromarray(picture(15, 15))
    assert np.array_equal(center_crop(once, 8), bicubic(once.resize((12, 12), Image.Resampling.BOX)))
    assert np.array_equal(center_crop(not_quite, 8), bicubic(not_quite))


# ---------------------------------------------------------------- folders of images

def test_items_of_a_folder(tmp_path):
    """Values, labels by the classes' names, mirror images."""
    names = ["cat/1.png", "cat/2.png", "ant/1.png"]
    pixels = {name: picture(8, 8, 3, seed=i) for i, name in enumerate(names)}
    data = ImageFolderData(write(tmp_path, {name: Image.fromarray(p) for name, p in pixels.items()}), 8)
    assert data.class_names == ["ant", "cat"] and len(data) == 3
    assert (data.channels, data.flips) == (3, True)
    for index, (name, label) in enumerate([(names[2], 0), (names[0], 1), (names[1], 1)]):
        expected = ((pixels[name].transpose(2, 0, 1) / 255 - 0.5) / 0.5).astype(np.float32)
        image, found = data[index, False]
        assert found == label
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)
        assert torch.equal(data[index, True][0], image.flip(2))


def test_black_and_white_are_the_ends(tmp_path):
    halves = np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0)
    image, _ = ImageFolderData(write(tmp_path, {"a/1.png": Image.fromarray(halves)}), 2)[0, False]
    assert torch.equal(image, torch.tensor([-1.0, 1.0]).expand(3, 2, 2))


def test_every_image_becomes_rgb(tmp_path):
    """Grey, black and white, a palette, transparency: none of them changes the shape or the colours."""
    rgb = Image.fromarray(picture(8, 8, 3))
    clear = Image.fromarray(picture(8, 8, seed=1))
    grey, palette, alpha = rgb.convert("L"), rgb.quantize(16), rgb.copy()
    alpha.putalpha(clear)
    palette.info["transparency"] = 3
    expected = {"1": grey.convert("1").convert("RGB"), "L": grey.convert("RGB"), "LA": grey.convert("RGB"),
                "P": palette.convert("RGB"), "RGBA": rgb}
    grey_alpha = grey.convert("LA")
    grey_alpha.putalpha(clear)
    files = {"1": grey.convert("1"), "L": grey, "LA": grey_alpha, "P": palette, "RGBA": alpha}
    data = ImageFolderData(write(tmp_path, {f"a/{mode}.png": image for mode, image in files.items()}), 8)
    assert len(data) == 5
    for index, mode in enumerate(expected):
        with Image.open(tmp_path / f"a/{mode}.png") as stored:
            assert stored.mode == mode
        image, _ = data[index, False]
        assert np.array_equal((image.permute(1, 2, 0) * 127.5 + 127.5).round(), expected[mode]), mode


def test_a_folder_that_is_none(tmp_path):
    picture_of_a_cat = Image.fromarray(picture(8, 8, 3))
    flat = write(tmp_path / "flat", {"1.png": picture_of_a_cat})
    half = write(tmp_path / "half", {"cat/1.png": picture_of_a_cat, "dog/notes.txt": b"none yet"})
    for root in (str(tmp_path / "missing"), flat, flat + "/1.png", half):
        with pytest.raises(UserError, match=f"--data-path {root}: "):
            open_data(root, 8)
    with pytest.raises(UserError, match="dog"):
        open_data(half, 8)


# ---------------------------------------------------------------- loading

def pairs(data, steps):
    return GlobalBatches(len(data), 2, slice(0, 2), seed=0, first=0, last=steps, flips=True)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_load_batches(tmp_path, workers):
    """In the order of the batches, however many workers."""
    files = {f"{i % 2}/{i}.png": Image.fromarray(picture(8, 8, 3, seed=i)) for i in range(6)}
    data = ImageFolderData(write(tmp_path, files), 8)
    batches = pairs(data, steps=5)
    loaded = list(load_batches(data, batches, workers, CPU))
    assert len(loaded) == len(batches) == 5
    for (images, labels), keys in zip(loaded, batches):
        assert torch.equal(images, torch.stack([data[key][0] for key in keys]))
        assert labels.tolist() == [data[key][1] for key in keys]


@forks
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no image",
], ids=["truncated", "empty", "garbage"])
def test_a_broken_image_is_named(tmp_path, workers, damage):
    """In a sentence, not in a worker's traceback."""
    names = [f"cat/{i}.png" for i in range(4)]
    root = write(tmp_path, {name: Image.fromarray(picture(8, 8, 3)) for name in names})
    bad = tmp_path / names[2]
    bad.write_bytes(damage(bad.read_bytes()))
    data = ImageFolderData(root, 8)
    with pytest.raises(UserError, match=str(bad)) as caught:
        list(load_batches(data, pairs(data, steps=2), workers, CPU))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- the order

def batches(first=0, last=30, rows=slice(0, 4), seed=0, flips=True, items=23):
    return list(GlobalBatches(items, 4, rows, seed, first, last, flips))


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
    assert len(GlobalBatches(23, 4, slice(0, 4), 0, 3, 30, True)) == 27 == len(batches(first=3))


# ---------------------------------------------------------------- digits

def test_digits_are_split_without_overlap():
    train, held_out = DigitsData("train"), DigitsData("held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    pictures = [{image.numpy().tobytes() for image in split.images} for split in (train, held_out)]
    assert not pictures[0] & pictures[1]
    for split in (train, held_out):
        image, label = split[3, False]
        assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and label in range(10)
        assert split.images.min() == -1 and split.images.max() == 1
        assert split.class_names == [str(i) for i in range(10)] and set(split.labels) == set(range(10))
    assert torch.equal(train[3, True][0], train[3, False][0].flip(2))
    assert (DigitsData.channels, DigitsData.flips) == (1, False)


def test_digits_by_name():
    assert isinstance(open_data("digits", 8), DigitsData)
    with pytest.raises(UserError, match=r"--image-size 16.*--image-size 8"):
        open_data("digits", 16)


def test_the_classifier_judges_samples():
    """Real digits that went the way of samples are as good as real ones; wrong labels are not."""
    classifier, real = DigitsClassifier(), DigitsData("held-out")
    labels = np.array(real.labels)
    assert 0.97 < classifier.accuracy < 1
    images = to_uint8(real.images).numpy()
    assert classifier.agreement(images, labels) == pytest.approx(classifier.accuracy, abs=0.01)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert classifier.agreement(images, shuffled) == pytest.approx(0.1, abs=5 * (0.09 / len(labels)) ** 0.5)
