"""What commands say about the data at the start: folders, sizes, numbers of a VAE, dead workers, chosen classes."""
import json
import shutil

import pytest
import torch
from PIL import Image

import evaluate
from autoencoder.checks import check_autoencoder
from autoencoder.vae import load_autoencoder
from common.errors import ArgumentError
from data.image_folder import ImageFolderDataset
from data.image_io import read_image_size
from data.latent_cache.reader import replace_corrupt_indices
from data.loader import describe_worker_death, raise_worker_deaths
from evaluation.image_sources import FolderImages

TINY = ["--image-size", 8, "--vae", "none", "--model", "DiT-S/2", "--depth", 1, "--hidden-size", 16, "--num-heads", 2,
        "--global-batch-size", 4, "--num-workers", 0, "--max-steps", 1]


def save(path, size=(8, 8), gray=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (gray, 100, 50)).save(path, **options)


def classes(root, names, count=2):
    for number, name in enumerate(names):
        for index in range(count):
            save(root / name / f"{index}.png", gray=20 * number)
    return root


def run(command, name, *flags, status=0):
    got, out, err = command(name, *flags)
    assert got == status and "Traceback" not in err, out + err
    return out + err


def train(command, tmp_path, *flags, status=0):
    return run(command, "train", "--data-path", tmp_path / "data", "--results-dir", tmp_path / "runs", *TINY, *flags,
               status=status)


# ---------------------------------------------------------------- folders

def test_training_shows_classes_and_what_was_passed_over(command, tmp_path):
    """In log.txt too; the hidden folder is no class."""
    classes(tmp_path / "data", ["ape", "bat", ".trash"])
    (tmp_path / "data" / "ape" / "movie.mp4").touch()
    out = train(command, tmp_path, "--num-classes", 2)
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    for text in (out, log.read_text()):
        assert "contains 4 images in 2 classes" in text and "0 ape, 1 bat" in text
        assert "hidden files or folders: 1" in text and "1 .mp4" in text


def test_extraction_shows_classes_and_what_was_passed_over(command, vae_folder, tmp_path):
    classes(tmp_path / "data", ["ape", "bat", "__MACOSX"])
    flags = ["--data-path", tmp_path / "data", "--features-path", tmp_path / "cache", "--image-size", 8,
             "--vae", vae_folder, "--num-workers", 0]
    out = run(command, "extract_features", *flags)
    assert "0 ape, 1 bat" in out and "operating system: 1" in out and "is complete: 4 images" in out
    inside = tmp_path / "link"
    inside.symlink_to(tmp_path / "data")
    err = run(command, "extract_features", *flags[:2], "--features-path", inside / "cache", *flags[4:], status=2)
    assert "--features-path" in err  # a link into the data is inside the data


# ---------------------------------------------------------------- sizes of images

@pytest.fixture
def measured(monkeypatch):
    """The number of images that a feature space was given."""
    counts, load = [], evaluate.load_feature_space

    def load_counting(*args):
        features = load(*args)

        class Counting(type(features)):
            def __call__(self, images):
                counts.append(len(images))
                return super().__call__(images)

        features.__class__ = Counting
        return features

    monkeypatch.setattr(evaluate, "load_feature_space", load_counting)
    return counts


@pytest.mark.parametrize("spoil", [
    lambda path: save(path, size=(8, 9)),
    lambda path: path.write_bytes(b"no image"),
    lambda path: path.write_bytes(b""),
], ids=["size", "damaged", "empty"])
def test_image_that_cannot_be_measured_is_refused_before_the_others_are(command, tmp_path, measured, spoil):
    for index in range(6):
        save(tmp_path / "set" / f"{index}.png")
    flags = ["reference", tmp_path / "set", "--features", "pixels", "--per-proc-batch-size", 2,
             "--output", tmp_path / "reference.npz"]
    spoil(tmp_path / "set" / "5.png")
    assert "5.png" in run(command, "evaluate", *flags, status=2) and measured == []
    save(tmp_path / "set" / "5.png")
    run(command, "evaluate", *flags)
    assert sum(measured) == 6


def test_sizes_are_those_of_upright_images(tmp_path):
    """By EXIF, in formats that store it before and after the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("0.jpg", "1.png", "2.webp", "3.tif"):
        save(tmp_path / name, size=(8, 12), exif=exif)
        assert read_image_size(str(tmp_path / name)) == (8, 12)
    images = FolderImages(str(tmp_path))
    assert images.batch(0, 4).shape == (4, 8, 12, 3)
    save(tmp_path / "4.png", size=(8, 12))
    with pytest.raises(ArgumentError, match=r"--image-size: .*4\.png has 8 x 12 pixels, others have 12 x 8"):
        FolderImages(str(tmp_path))
    assert len(FolderImages(str(tmp_path), 8)) == 5  # all are cropped


# ---------------------------------------------------------------- corrupt images

@pytest.mark.parametrize("count, corrupt", [(15, {0, 1, 2}), (15, {12, 13, 14}), (40, {7, 8, 9, 10, 11}), (9, {0, 8})])
def test_corrupt_neighbors_get_different_substitutes(tmp_path, count, corrupt):
    """The same ones in training from images and from a cache; no image is read more than twice in an epoch."""
    for index in range(count):
        path = tmp_path / "a" / f"{index:02d}.png"
        save(path)
        if index in corrupt:
            path.write_bytes(b"")
    data, read, seen = ImageFolderDataset(str(tmp_path), 8, max_bad_images=9), [], []
    read_image = data.read
    data.read = lambda index: read.append(index) or read_image(index)
    for index in range(count):
        data.__getitems__([(index, False)])
        seen.append(read[-1])
    assert max(seen.count(index) for index in seen) == 2 and not corrupt & set(seen)
    assert replace_corrupt_indices(corrupt, count) == {index: seen[index] for index in corrupt}


# ---------------------------------------------------------------- a VAE's numbers

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("config", [
    *(dict(scaling_factor=value) for value in (0, None, "0.5", NAN, INF, -0.5, True, [0.5], 1e-30, 1e30, {})),
    *(dict(shift_factor=value) for value in ("0.1", NAN, -INF, True, [0.1], 1e30)),
    dict(latents_mean=[0.0] * 4), dict(latents_std=[1.0] * 4), dict(latents_mean=[0.0] * 2, latents_std=[1.0] * 2),
    dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 5), dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]),
    dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, -1.0, 1.0]), dict(latents_mean=0.0, latents_std=1.0),
    dict(latents_mean=[NAN] * 4, latents_std=[1.0] * 4), dict(latents_mean=["0"] * 4, latents_std=[1.0] * 4),
    dict(latents_mean=[None] * 4, latents_std=[1.0] * 4), dict(latents_mean=[], latents_std=[]),
], ids=str)
def test_numbers_of_a_vae_are_checked_when_it_is_opened(vae_folder, tmp_path, config):
    with pytest.raises(ArgumentError, match=rf"--vae \S+: .*config\.json.*{list(config)[-1][:7]}") as caught:
        load_autoencoder(with_config(vae_folder, tmp_path, **config))
    assert set(caught.value.arguments) == {"vae"} and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    dict(scaling_factor=1), dict(shift_factor=None), dict(shift_factor=0), dict(shift_factor=-2),
    dict(latents_mean=None, latents_std=None), dict(latents_mean=[0, 1, 2, 3], latents_std=[1, 2, 3, 4]),
    dict(latents_mean=[[[[0.0]], [[0.0]], [[0.0]], [[0.0]]]], latents_std=[1.0] * 4),
], ids=str)
def test_usual_numbers_of_a_vae_are_taken(vae_folder, tmp_path, config):
    scaling = load_autoencoder(with_config(vae_folder, tmp_path, **config)).latent_scaling
    assert torch.isfinite(scaling.draw(torch.zeros(1, 8, 2, 2), torch.zeros(1, 4, 2, 2))).all()


def with_config(vae_folder, tmp_path, **config):
    folder = tmp_path / "vae"
    shutil.copytree(vae_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_vae_that_makes_nan_is_refused_at_the_start(vae_folder, part):
    autoencoder = load_autoencoder(str(vae_folder))
    next(getattr(autoencoder.vae, part).parameters()).data.fill_(NAN)
    with pytest.raises(ArgumentError, match=f"--vae {vae_folder}: .*non-finite"):
        list(check_autoencoder(autoencoder, torch.zeros(2, 3, 8, 8), torch.device("cpu")))


# ---------------------------------------------------------------- workers

@pytest.mark.parametrize("error", [
    EOFError(), ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(), ConnectionError("..."),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly\nwith a second line"),
], ids=repr)
def test_death_of_a_worker_is_a_sentence_without_holes(error):
    text = str(describe_worker_death(error, 4))
    assert text.startswith("--num-workers 4: ") and "\n" not in text
    assert not [hole for hole in ("()", ": .", ". .", "..", "(.", "None") if hole in text]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), OSError(5, "I/O error"), ValueError()], ids=repr)
def test_other_errors_are_no_death_of_a_worker(error):
    class Loader:
        num_workers = 2

        def __iter__(self):
            yield 1
            raise error

    assert describe_worker_death(error, 4) is None
    with pytest.raises(type(error)) as caught:
        list(raise_worker_deaths(Loader()))
    assert caught.value is error


# ---------------------------------------------------------------- classes of a picture

def test_record_of_a_picture_can_be_typed_again(command, tmp_path):
    """Folders 0 .. 11, whose numbers are in another order than their names."""
    classes(tmp_path / "data", [str(number) for number in range(12)], count=1)
    train(command, tmp_path, "--num-classes", 12)
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoints/*.pt")

    def sample(name, *labels, status=0):
        return run(command, "sample", "--ckpt", checkpoint, "--num-sampling-steps", "ddim2", "--output",
                   tmp_path / name, "--class-labels", *labels, status=status)

    assert "'2' (4), '10' (2)" in sample("first.png", 2, 10)
    with Image.open(tmp_path / "first.png") as picture:
        recorded = json.loads(picture.text["DiT"])["class_labels"]
    sample("second.png", *recorded)
    assert recorded == ["2", "10"]
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert "--class-labels 12:" in sample("third.png", 12, status=2)
