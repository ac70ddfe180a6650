"""The built-in fractals, and the classifier in whose features they are compared."""
import json
import re

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import build_dataset
from data.builtin import BUILTIN_DATASETS
from data.fractals import VARIATION, FractalsDataset, IteratedFunctionSystem, chaos_game, draw, get_system, random_words
from data.image_folder import ImageFolderDataset
from data.image_io import to_uint8
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from evaluation.classifier import train_classifier
from evaluation.feature_statistics import FeatureStatistics
from evaluation.features import load_feature_space
from evaluation.image_sources import open_image_source
from evaluation.scores import compute_scores
from helpers import ROOT, TINY, call
from run_files import pixels

FRACTALS = ["--data-path", "fractals", "--num-classes", 3, "--image-size", 8, *TINY, "--global-batch-size", 8]


def test_splits_are_disjoint_and_balanced():
    train, held_out = FractalsDataset(8, 3), FractalsDataset(8, 3, "held-out")
    assert (len(train), len(held_out)) == (3000, 300)
    assert not set(train.paths) & set(held_out.paths) and len({*train.paths, *held_out.paths}) == 3300
    for split in (train, held_out):
        assert split.class_names == ["fractal 000", "fractal 001", "fractal 002"]
        assert np.bincount(split.labels).tolist() == [len(split) // 3] * 3
    pictures = {split.read(index).numpy().tobytes() for split in (train, held_out) for index in range(0, 300)}
    assert len(pictures) == 600
    assert FractalsDataset.flips is False


def test_image_is_a_function_of_its_class_and_index():
    want = draw(5, 1003, 32)
    np.random.seed(7)
    get_system.cache_clear()
    for other in (9, 5, 2):
        draw(other, 3, 16)
    np.testing.assert_array_equal(draw(5, 1003, 32), want)
    for classes in (6, 50):
        image = FractalsDataset(32, classes, "held-out").read(503)
        np.testing.assert_array_equal(to_uint8(image[None])[0].permute(2, 0, 1), want)


def test_images_do_not_change():
    """Sums of pixels computed once: another value would change the data of every measurement."""
    pixel_sums = {(0, 0): [18638, 25787, 45240], (1, 1000): [111338, 86845, 45344], (999, 7): [43184, 74099, 92035]}
    for (label, index), sums in pixel_sums.items():
        assert draw(label, index, 32).sum(axis=(1, 2)).tolist() == sums


def test_workers_do_not_change_the_images():
    data = FractalsDataset(16, 20)
    def batches(workers):
        order = StepBatchSampler(len(data), 16, slice(0, 16), seed=1, start_step=0, end_step=4, flips=False)
        loader = PrefetchLoader(data, order, workers, torch.device("cpu"), print)
        return [(images, cond["y"]) for images, cond in loader]

    one, other = batches(0), batches(2)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other))
    assert len(one) == len(other) == 4


@pytest.mark.parametrize("size", [1, 5, 32, 100])
def test_images_have_any_size(size):
    image = FractalsDataset(size, 2).read(1500)
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    assert image.min() >= -1 and -0.5 < image.max() <= 1


def test_class_is_the_same_at_any_size():
    small = [draw(label, 3, 16).astype(float) for label in range(4)]
    large = [draw(label, 3, 64).astype(float).reshape(3, 16, 4, 16, 4).mean(axis=(2, 4)) for label in range(4)]
    distances = np.array([[np.abs(one - other).mean() for other in large] for one in small])
    assert (2 * distances.diagonal() < np.sort(distances, axis=1)[:, 1]).all()


def test_images_are_neither_empty_nor_full_and_classes_differ():
    means = []
    for label in range(60):
        images = np.stack([draw(label, index, 32) for index in range(0, 1100, 220)])
        lit = (images.max(axis=1) > 40).mean(axis=(1, 2))
        assert lit.min() > 0.08 and lit.max() < 0.95, (label, lit)
        assert images.max() > 100
        means.append(images.mean(axis=0))
    held_out = [draw(label, 1050, 32) for label in range(60)]
    nearest = [min(range(60), key=lambda other: np.abs(image - means[other]).mean()) for image in held_out]
    assert np.mean(np.array(nearest) == range(60)) > 0.9


def test_maps_of_every_image_contract():
    for label in range(50):
        linear = get_system(label).maps[:, :2]
        for signs in range(16):
            factors = 1 + VARIATION * np.array([1 if signs >> bit & 1 else -1 for bit in range(4)])
            longest = np.linalg.norm((linear * factors.reshape(2, 2, 1)).transpose(2, 0, 1), 2, axis=(1, 2))
            assert longest.max() < 1


def test_chaos_game_draws_the_sierpinski_triangle():
    """Three maps that halve: 27 of 64 squares are visited, equally often."""
    corners = np.array([[0, 0.5, 0], [0, 0, 0.5]])
    maps = np.stack([np.stack([[0.5, 0, right], [0, 0.5, down]]) for right, down in corners.T], axis=-1)
    system = IteratedFunctionSystem(maps, np.arange(256) % 3, np.zeros((3, 9)))
    points, color_indices = chaos_game(system, random_words(40_000, 9, 0, 0), 2000, 100)
    cells = (points * 8).astype(int)
    counts = np.bincount(cells[0] * 8 + cells[1], minlength=64)
    want = np.array([[(i & j) == 0 for j in range(8)] for i in range(8)]).ravel()
    assert ((counts > 0) == want).all()
    assert np.allclose(counts[want], counts.sum() / 27, rtol=0.1)
    # The last map that a point went through decides in which half of the picture it lies.
    assert (points[0][color_indices // 3 == 1] >= 0.5).all() and (points[0][color_indices // 3 != 1] <= 0.5).all()


def test_code_in_the_docs_draws_their_picture(tmp_path, monkeypatch):
    code = (ROOT / "docs" / "fractals.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert np.abs(pixels("docs/fractals.png") - pixels(ROOT / "docs" / "fractals.png")).mean() < 0.5


def test_defaults_follow_from_the_data_set(run_ok, tmp_path):
    out = run_ok("train", "--data-path", "fractals", *TINY, "--global-batch-size", 4, "--max-steps", 1,
                 "--num-workers", 0, "--results-dir", tmp_path)
    assert "Dataset contains 100,000 images in 100 classes (fractals)" in out
    for name, value in dict(image_size=32, num_classes=100, vae="none", flip=False, lr=1e-4, ema_decay=0.9999,
                            epochs=1400, depth=1).items():
        assert f"{name}={value}," in out or f"{name}={value}\n" in out, name
    assert out.count("WARNING") == out.count("WARNING: the EMA still holds 100% of its start") == 1


def test_tokens_are_as_many_as_in_the_paper():
    import models
    side = BUILTIN_DATASETS["fractals"]["image_size"]
    with torch.device("meta"):
        for patch, tokens in ((2, 256), (4, 64), (8, 16)):
            model = models.DiT_models[f"DiT-S/{patch}"](input_size=side, in_channels=3, num_classes=100)
            assert model.pos_embed.shape[1] == tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    call("train", *FRACTALS, "--max-steps", 3, "--num-workers", 0, "--results-dir", folder)
    return folder / "000-DiT-S-2" / "checkpoints" / "0000003.pt"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier of three classes, trained for seconds."""
    path = tmp_path_factory.mktemp("judge") / "classifier.pt"
    call("tools.train_classifier", "--data-path", "fractals", "--num-classes", 3, "--image-size", 8, "--num-workers", 0,
         "--width", 4, "--steps", 60, "--batch-size", 32, "--lr", 0.01, "--output", path)
    return path


def test_class_names_come_from_the_checkpoint(run_ok, trained, tmp_path):
    run_ok("sample", "--ckpt", trained, "--class-labels", "fractal 002", "0", "--num-sampling-steps", 2,
           "--output", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_checkpoint_is_scored_against_held_out_fractals(run_ok, trained, judge, tmp_path):
    out = run_ok("evaluate", "score", trained, "--reference", "fractals-held-out", "--features", judge,
                 "--num-fid-samples", 20, "--num-sampling-steps", 2, "--output", tmp_path / "x.json")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["reference"] == dict(path="fractals-held-out", images=300, image_size=8, num_classes=3)
    assert record["features"]["space"] == "a classifier of fractals (3 classes)"
    assert set(record["scores"]) == {"frechet_distance", "precision", "recall", "class_agreement"}
    assert "Frechet distance (a classifier of fractals (3 classes), 20 images)" in out and "FID" not in out
    assert re.search(r"class agreement: \d+\.\d% \(of real images not trained on: \d+\.\d%\)", out)


def test_agreement_of_real_images_is_the_accuracy(run_ok, judge, tmp_path):
    sizes = ["--num-classes", 3, "--image-size", 8]
    run_ok("evaluate", "reference", "fractals", *sizes, "--features", judge, "--output", tmp_path / "ref.npz")
    run_ok("evaluate", "score", "fractals-held-out", *sizes, "--reference", tmp_path / "ref.npz", "--features", judge,
           "--output", tmp_path / "x.json")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["scores"]["class_agreement"] == pytest.approx(record["features"]["accuracy"], abs=0.004)
    assert record["features"]["accuracy"] > 0.8
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise, arr_1=np.arange(300) % 3)
    run_ok("evaluate", "score", tmp_path / "noise.npz", "--reference", tmp_path / "ref.npz", "--features", judge,
           "--output", tmp_path / "y.json")
    other = json.loads((tmp_path / "y.json").read_text())
    assert other["scores"]["frechet_distance"] > 10 * record["scores"]["frechet_distance"]
    assert other["scores"]["class_agreement"] < 0.6


def test_training_is_scored_periodically(run_ok, judge, tmp_path):
    run_ok("train", *FRACTALS, "--max-steps", 2, "--num-workers", 0, "--eval-every", 2,
           "--eval-reference", "fractals-held-out", "--eval-features", judge, "--eval-samples", 12,
           "--eval-sampling-steps", 2, "--results-dir", tmp_path)
    assert "class_agreement" in (tmp_path / "000-DiT-S-2" / "evaluations.csv").read_text()


def test_nll_of_fractals(run_ok, trained, tmp_path):
    out = run_ok("evaluate", "nll", trained, "--data", "fractals-held-out", "--num-images", 2,
                 "--output", tmp_path / "x.json")
    assert "bits" in out


def test_latent_cache_of_fractals_has_no_mirror_images(run_ok, vae_folder, tmp_path):
    run_ok("extract_features", "--data-path", "fractals", "--num-classes", 1, "--image-size", 8, "--vae", vae_folder,
           "--num-workers", 0, "--batch-size", 250, "--features-path", tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert (manifest["count"], manifest["orientations"], manifest["data_path"]) == (1000, 1, "fractals")


def test_the_classifier_of_digits(run_ok, tmp_path):
    run_ok("tools.train_classifier", "--data-path", "digits", "--num-workers", 0, "--width", 8, "--steps", 60,
           "--batch-size", 64, "--lr", 0.01, "--output", tmp_path / "digits.pt")
    features = load_feature_space(str(tmp_path / "digits.pt"), "cpu")
    images = open_image_source("digits-held-out")
    pool = features(images.batch(0, len(images))).pool
    assert pool.shape == (359, 32)
    agreement = (features.predict_class(pool).numpy() == images.class_labels()).mean()
    assert agreement == pytest.approx(features.metadata()["accuracy"], abs=0.006) and agreement > 0.8
    assert features.metadata()["space"] == "a classifier of digits (10 classes)"


def test_a_classifier_of_a_folder_needs_a_validation_folder(run_ok, run_error, image_folder, tmp_path):
    flags = ["--data-path", image_folder, "--image-size", 16, "--num-workers", 0, "--width", 4, "--steps", 3,
             "--batch-size", 8, "--output", tmp_path / "c.pt"]
    assert "--val-path" in run_error("tools.train_classifier", *flags)
    assert "on 24 images" in run_ok("tools.train_classifier", *flags, "--val-path", image_folder)


def test_classifier_is_a_function_of_its_seed():
    data = FractalsDataset(8, 2)
    one, again, other = (train_classifier(data, steps=3, batch_size=8, width=4, seed=seed).state_dict()
                         for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_labels_unknown_to_the_classifier_are_refused(run_error, judge, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((9, 8, 8, 3), dtype=np.uint8), arr_1=np.arange(9))
    err = run_error("evaluate", "score", tmp_path / "x.npz", "--reference", "fractals-held-out", "--num-classes", 3,
                    "--features", judge, "--output", tmp_path / "x.json")
    assert "labels 0 .. 8" in err and "fractals (3 classes)" in err


def test_class_agreement_needs_labels(judge):
    features = load_feature_space(str(judge), "cpu")
    rows = torch.randn(10, 16)
    measured = FeatureStatistics(10, (rows.mean(dim=0).numpy(), np.cov(rows.numpy(), rowvar=False)), features=rows)
    assert "class_agreement" not in compute_scores(measured, measured, features)
    labels = features.predict_class(rows).numpy()
    assert compute_scores(measured, measured, features, labels)["class_agreement"] == 1
    labels[:5] = 3
    assert compute_scores(measured, measured, features, labels)["class_agreement"] == 0.5


CLASSIFIER = ["--output", "c.pt", "--data-path"]


@pytest.mark.parametrize("name, flags, problem", [
    ("train", [*FRACTALS, "--patch-size", 3], r"--image-size 8: .*\(8, 8\) .* patch_size 3"),
    ("train", [*FRACTALS, "--num-classes", 0], r"argument --num-classes: 0 "),
    ("tools.train_classifier", [*CLASSIFIER, "nowhere"], r"--data-path nowhere: "),
    ("tools.train_classifier", [*CLASSIFIER, "digits", "--num-classes", 9], r"--num-classes 9: "),
    ("tools.train_classifier", [*CLASSIFIER, "fractals", "--output", "no/c.pt"], r"--output no/c.pt: "),
    ("tools.train_classifier", [*CLASSIFIER, "digits", "--image-size", 9], r"--image-size 9: .* 8 pixels"),
    ("tools.train_classifier", [*CLASSIFIER, "digits", "--val-path", "fractals"], r"--val-path fractals: "),
    ("tools.train_classifier", [*CLASSIFIER, "digits", "--batch-size", 2000], r"--batch-size 2000: .* 1438 images"),
    ("extract_features", ["--data-path", "digits", "--num-classes", 9, "--features-path", "c"], r"--num-classes 9: "),
    ("extract_features", ["--data-path", "fractals", "--vae", "none", "--features-path", "c"], r"--vae none"),
    ("evaluate", ["score", "x.npz", "--reference", "digits", "--num-classes", 3], r"--num-classes"),
])
def test_wrong_flags_are_refused(run_error, tmp_path, monkeypatch, name, flags, problem):
    monkeypatch.chdir(tmp_path)
    assert re.search(problem, run_error(name, *flags))
    assert not list(tmp_path.glob("*.pt"))


def test_corrupt_image_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read the image \S+x\.png"):
        train_classifier(ImageFolderDataset(str(tmp_path), 8), steps=1, batch_size=2)


def test_fractals_have_a_name():
    assert build_dataset("fractals", 8).class_names[-1] == "fractal 099"
    assert len(build_dataset("fractals-held-out", 8, num_classes=7)) == 700
    images = open_image_source("fractals-held-out", 8, 2)
    assert images.batch(0, 3).shape == (3, 8, 8, 3) and images.batch(0, 3).dtype == torch.uint8
    np.testing.assert_array_equal(images.batch(100, 101)[0].permute(2, 0, 1), draw(1, 1000, 8))
