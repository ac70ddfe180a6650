"""evaluate.py with files as people have them: damaged, of other tools, of other names, where nothing can be written."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint_io import is_checkpoint, load_checkpoint, save_checkpoint
from common.errors import ArgumentError, UserError
from common.files import read_npz_array
from evaluation.features import INCEPTION_FILE, FeatureSpace, InceptionFeatures, load_feature_space
from evaluation.file_kinds import Purpose, list_arrays
from evaluation.image_sources import NpzImages, to_labels
from evaluation.metrics import frechet_distance
from evaluation.records import check_output, record_path
from helpers import DIGITS, call
from run_files import picture, stored

pytestmark = pytest.mark.integration
PIXELS = ["--features", "pixels"]
FEW = ["--num-sampling-steps", "ddim2", "--cfg-scale", 1, "--num-fid-samples", 4]


def write_set(path, count=8, seed=0, **arrays):
    """Write an .npz of `count` images of 4 x 4 pixels, and other arrays, and return its path as text."""
    np.savez(path, arr_0=np.stack([picture(4, 4, 3, seed=seed + i) for i in range(count)]), **arrays)
    return str(path)


def damage(path, position=0.5, count=20):
    """Change bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * position)
    content[start:start + count] = bytes(byte ^ 0x55 for byte in content[start:start + count])
    path.write_bytes(content)


@pytest.fixture
def score(command, tmp_path):
    """score(*flags) -> (exit status, output, record or None)."""
    def score(*flags):
        path = tmp_path / "score.json"
        status, out, err = command("evaluate", "score", *flags, "--output", path)
        assert "Traceback" not in err
        return status, out + err, json.loads(path.read_text()) if status == 0 else None
    return score


# ---------------------------------------------------------------- distances below zero

def test_the_distance_of_a_set_to_itself_is_zero_and_the_record_says_why(score, tmp_path):
    one = write_set(tmp_path / "one.npz")
    status, out, record = score(one, "--reference", one, *PIXELS)
    assert status == 0 and record["scores"]["frechet_distance"] == 0 and "-0.0000" not in out
    assert str(record["scores"]["frechet_distance"]) == "0.0" and "rounding" in record["rounding"]
    status, _, record = score(one, "--reference", write_set(tmp_path / "two.npz", seed=50), *PIXELS)
    assert status == 0 and record["scores"]["frechet_distance"] > 1 and record["rounding"] is None


@pytest.mark.parametrize("count", [2, 5, 30])
def test_distances_are_never_below_zero_and_stay_nan(count):
    rows = np.random.default_rng(count).standard_normal((count, 20)) * 100
    gaussian = rows.mean(axis=0), np.cov(rows, rowvar=False)
    assert 0 <= frechet_distance(gaussian, gaussian) < 1e-6
    assert not np.isfinite(frechet_distance((np.full(20, 1e200), gaussian[1]), gaussian))


# ---------------------------------------------------------------- checksums

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("role", ["samples", "reference"])
def test_images_that_do_not_have_their_crc_are_refused(score, tmp_path, save, role):
    save(tmp_path / "damaged.npz", arr_0=np.stack([picture(8, 8, 3, seed=i) for i in range(9)]))
    damage(tmp_path / "damaged.npz")
    good, damaged = write_set(tmp_path / "good.npz"), str(tmp_path / "damaged.npz")
    samples, reference = (damaged, good) if role == "samples" else (good, damaged)
    status, out, _ = score(samples, "--reference", reference, *PIXELS)
    assert status == 2 and "damaged.npz is damaged" in out


def test_statistics_and_labels_that_do_not_have_their_crc_are_refused(command, tmp_path):
    one = write_set(tmp_path / "one.npz", count=400)
    status, _, err = command("evaluate", "reference", one, *PIXELS, "--output", tmp_path / "ref.npz")
    assert status == 0, err
    damage(tmp_path / "ref.npz", 0.6)
    status, _, err = command("evaluate", "score", one, "--reference", tmp_path / "ref.npz", *PIXELS)
    assert status == 2 and "ref.npz is damaged" in err
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.arange(999))
    damage(tmp_path / "labels.npz", 0.5)
    with pytest.raises(UserError, match="damaged"):
        read_npz_array(str(tmp_path / "labels.npz"), "arr_1")


@pytest.mark.parametrize("stored, warns, is_used", [
    ("right", False, True), ("RIGHT", False, True), ("0" * 64, True, False), (5, False, False), (None, False, False)])
def test_a_set_without_the_sha256_of_its_record_is_told(capsys, tmp_path, stored, warns, is_used):
    path = write_set(tmp_path / "set.npz")
    sha256 = NpzImages(path).metadata()["sha256"]
    stored = {"right": sha256, "RIGHT": sha256.upper()}.get(stored, stored)
    (tmp_path / "set.json").write_text(json.dumps(dict(sha256=stored, made=dict(model="M"))))
    metadata = NpzImages(path).metadata()
    assert ("SHA-256" in capsys.readouterr().out) == warns and ("made" in metadata) == is_used


def test_a_damaged_set_of_samples_is_not_described_anew(command, tmp_path):
    call("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path / "runs")
    checkpoint = next((tmp_path / "runs").glob("*/checkpoints/0000001.pt"))
    flags = ["--ckpt", checkpoint, "--num-sampling-steps", "ddim2", "--cfg-scale", 1, "--sample-dir", tmp_path / "set"]
    assert command("sample_ddp", *flags, "--num-fid-samples", 6)[0] == 0
    (path,), (record,) = (list((tmp_path / "set").glob(pattern)) for pattern in ("*.npz", "*.json"))
    before = record.read_text()
    damage(path, 0.3)
    for count in (6, 8):
        status, _, err = command("sample_ddp", *flags, "--num-fid-samples", count)
        assert status == 2 and "damaged" in err and record.read_text() == before
    # A set that was written again has the right CRC, but is another.
    np.savez(path, arr_0=np.zeros((6, 8, 8, 3), np.uint8), arr_1=np.zeros(6, np.int64))
    status, _, err = command("sample_ddp", *flags, "--num-fid-samples", 8)
    assert status == 2 and "SHA-256" in err and record.read_text() == before


def test_inception_of_the_standard_name_must_have_its_sha256(tmp_path):
    torch.save(dict(a=torch.zeros(3)), tmp_path / INCEPTION_FILE)
    with pytest.raises(ArgumentError, match="SHA-256") as caught:
        InceptionFeatures(torch.device("cpu"), str(tmp_path / INCEPTION_FILE))
    assert "inception" in caught.value.arguments


# ---------------------------------------------------------------- labels, and scores that are left out

NUMBERS = np.array([0, 3, 1, 2])


@pytest.mark.parametrize("stored", [
    NUMBERS, NUMBERS.astype("uint8"), NUMBERS.astype(">i4"), NUMBERS.astype("float32"), NUMBERS.astype("float16"),
    NUMBERS[:, None], NUMBERS[:, None].astype("float64"), np.eye(5)[NUMBERS], np.eye(4, dtype=bool)[NUMBERS],
    np.eye(4, dtype="int8")[NUMBERS]])
def test_labels_are_whole_numbers_of_any_type_or_one_hot(stored):
    assert to_labels(stored, 4).tolist() == NUMBERS.tolist()


@pytest.mark.parametrize("stored", [
    NUMBERS + 0.5, np.full(4, np.nan), np.full(4, np.inf), np.full(4, 1e30), NUMBERS.astype(str), NUMBERS[:3],
    np.zeros((4, 3)), np.ones((4, 3)), np.full((4, 3), 0.3), np.zeros((4, 2, 2)), np.array(3), NUMBERS.astype(complex)])
def test_other_labels_are_none(stored):
    assert to_labels(stored, 4) is None


class ClassifyingPixels(FeatureSpace):
    """Pixels, and a classifier that finds class 0 everywhere."""

    device, num_classes = torch.device("cpu"), 4

    def metadata(self):
        return dict(space="pixels", range="0 .. 1", accuracy=1.0)

    def __call__(self, images):
        return load_feature_space("pixels", self.device)(images)

    def predict_class(self, pool):
        return torch.zeros(len(pool), dtype=torch.long)


@pytest.mark.parametrize("labels, reason", [
    (None, "arr_1"), (np.array(["ape"] * 8), "<U3"), (np.array([None] * 8), "Python objects"),
    (np.full((8, 3), 0.2), "(8, 3)")])
def test_a_score_that_is_left_out_is_told_with_its_reason(score, tmp_path, monkeypatch, labels, reason):
    import evaluate
    monkeypatch.setattr(evaluate, "load_feature_space", lambda *_: ClassifyingPixels())
    samples = write_set(tmp_path / "a.npz", **({} if labels is None else dict(arr_1=labels)))
    status, out, record = score(samples, "--reference", write_set(tmp_path / "b.npz", seed=9))
    assert status == 0 and "class_agreement: left out" in out and reason in record["left_out"]["class_agreement"]
    good = write_set(tmp_path / "c.npz", arr_1=np.zeros(8, dtype="float32"))
    status, out, record = score(good, "--reference", samples)
    assert status == 0 and record["scores"]["class_agreement"] == 1 and record["left_out"] == {}


# ---------------------------------------------------------------- files of other tools

MEAN, COVARIANCE = np.zeros(6), np.eye(6)
IMAGES = np.zeros((5, 4, 4, 3), np.uint8)


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


FOREIGN = {  # name: how it is written, and what the sentence says beside what is wanted
    "stats.npy": (lambda path: np.save(path, dict(mu=MEAN, sigma=COVARIANCE), allow_pickle=True), "mu=d['mu']"),
    "stats.pkl": (lambda path: write_pickle(path, dict(mu=MEAN, sigma=COVARIANCE)), "mu=d['mu']"),
    "edm2.pkl": (lambda path: write_pickle(path, dict(fid=dict(mu=MEAN, sigma=COVARIANCE))), "['fid']"),
    "other.pkl": (lambda path: write_pickle(path, [1, 2]), "a Python pickle"),
    "names.npz": (lambda path: np.savez(path, m=MEAN, s=COVARIANCE), "mu=d['m'], sigma=d['s']"),
    "capitals.npz": (lambda path: np.savez(path, MU=MEAN, SIGMA=COVARIANCE), "mu=d['MU'], sigma=d['SIGMA']"),
    "half.npz": (lambda path: np.savez(path, mu=MEAN), "no sigma"),
    "images.npy": (lambda path: np.save(path, IMAGES), "arr_0=d"),
    "images.npz": (lambda path: np.savez(path, x=IMAGES, y=np.arange(5)), "arr_0=d['x']"),
    "first.npz": (lambda path: np.savez(path, x=IMAGES.transpose(0, 3, 1, 2)), "transpose(0, 2, 3, 1)"),
    "nothing.npz": (lambda path: np.savez(path), "nothing"),
    "empty.npz": (lambda path: path.touch(), "empty"),
    "page.npz": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "lfs.npz": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "torch.pt": (lambda path: torch.save(dict(mu=torch.zeros(3)), path), "PyTorch"),
    "picture.png": (lambda path: Image.fromarray(IMAGES[0]).save(path), "one image"),
    "table.csv": (lambda path: path.write_text("1,2\n"), "kind"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_references_of_other_tools_are_told_what_they_are(tmp_path, name):
    write, says = FOREIGN[name]
    write(tmp_path / name)
    for path in (tmp_path / name, tmp_path / name.upper()):
        (tmp_path / name).rename(path) if path.name != name else None
        with pytest.raises(UserError) as caught:
            list_arrays(str(path), Purpose(is_reference=True, space=dict(space="inception", spatial="mixed_6")))
        assert says in str(caught.value) and "mu" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["stats.npy", "stats.pkl", "edm2.pkl", "names.npz", "images.npy", "images.npz"])
def test_the_advised_conversion_works(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    FOREIGN[name][0](tmp_path / name)
    purpose = Purpose(is_reference=True, space=dict(space="inception", spatial="mixed_6"))
    with pytest.raises(UserError) as caught:
        list_arrays(name, purpose)
    exec("d = " + str(caught.value).split(": d = ")[1], dict(numpy=np, pickle=pickle))
    assert list_arrays("images.npz" if name.startswith("images") else "reference.npz", purpose)


def test_advice_for_other_feature_spaces_does_not_lead_in_a_circle(score, tmp_path):
    """Statistics without a record are of Inception: converting them would not help for pixels."""
    FOREIGN["names.npz"][0](tmp_path / "names.npz")
    status, out, _ = score(write_set(tmp_path / "a.npz"), "--reference", tmp_path / "names.npz", *PIXELS)
    assert status == 2 and "mu" in out and "evaluate.py reference" in out and "sigma=d" not in out


@pytest.mark.parametrize("arrays, says", [
    (dict(mu=MEAN, sigma=COVARIANCE), "--reference"), (dict(arr_0=IMAGES / 255), "float64"),
    (dict(arr_0=IMAGES[:0]), "(0, 4, 4, 3)"), (dict(arr_0=IMAGES[:, :0]), "(5, 0, 4, 3)"),
    (dict(arr_0=np.array([None])), "not a plain array")])
def test_samples_that_are_no_images_are_refused(score, tmp_path, arrays, says):
    np.savez(tmp_path / "samples.npz", **arrays)
    status, out, _ = score(tmp_path / "samples.npz", "--reference", write_set(tmp_path / "b.npz"), *PIXELS)
    assert status == 2 and says in out


# ---------------------------------------------------------------- small and constant sets

@pytest.mark.parametrize("samples, reference, says", [(1, 8, "3 samples"), (8, 3, "reference"), (3, 1, "reference")])
def test_sets_too_small_for_precision_are_told_before_the_work(score, tmp_path, monkeypatch, samples, reference, says):
    import evaluate
    monkeypatch.setattr(evaluate, "compute_statistics", None)  # would fail if it were called for the samples
    status, out, _ = score(write_set(tmp_path / "a.npz", samples), "--reference",
                           write_set(tmp_path / "b.npz", reference, seed=9), *PIXELS)
    assert status == 2 and says in out


def test_constant_images_have_a_distance(score, tmp_path):
    for name, value in (("black", 0), ("white", 255)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.full((6, 4, 4, 3), value, np.uint8))
    status, _, record = score(tmp_path / "black.npz", "--reference", tmp_path / "white.npz", *PIXELS)
    assert status == 0 and record["scores"]["frechet_distance"] == pytest.approx(48)


# ---------------------------------------------------------------- checkpoints by content

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call("train", *DIGITS, "--max-steps", 1, "--results-dir", folder)
    return stored(folder, 1)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a.PT", "a", "a.backup", "a.npz"])
def test_a_checkpoint_of_any_ending_is_sampled_and_scored(score, tmp_path, checkpoint, name):
    save_checkpoint(str(tmp_path / name), checkpoint)
    status, out, record = score(tmp_path / name, "--reference", "digits-held-out", *PIXELS, *FEW)
    assert status == 0 and record["samples"]["images"] == 4, out


def test_checkpoints_are_known_by_content_and_missing_ones_by_name(tmp_path):
    torch.save(dict(a=torch.zeros(2)), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    write_set(tmp_path / "images.pt") and (tmp_path / "images.pt.npz").rename(tmp_path / "images.pt")
    assert is_checkpoint(str(tmp_path / "legacy")) and not is_checkpoint(str(tmp_path / "images.pt"))
    assert is_checkpoint("missing.PT") and not is_checkpoint("missing") and not is_checkpoint(str(tmp_path))
    assert load_checkpoint(str(tmp_path / "legacy"))["a"].tolist() == [0, 0]


# ---------------------------------------------------------------- outputs

def test_outputs_that_cannot_be_written_are_refused_before_the_work(command, tmp_path, monkeypatch):
    from evaluation.image_sources import BuiltinImages
    monkeypatch.setattr(BuiltinImages, "batch", None)  # would fail if an image were read
    (tmp_path / "folder.npz").mkdir()
    for output in (tmp_path / "folder.npz", tmp_path / "nowhere" / "ref.npz", tmp_path / ("n" * 300 + ".npz"), "", " "):
        status, _, err = command("evaluate", "reference", "digits", *PIXELS, "--output", output)
        assert status == 2 and "--output" in err and "Traceback" not in err, err
    assert os.listdir(tmp_path) == ["folder.npz"]


def test_the_default_record_must_be_writable_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", lambda *args: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(ArgumentError, match="Read-only") as caught:
        check_output(None, ".json", default=str(tmp_path / "a.scores.json"))
    assert set(caught.value.arguments) == {"output"}


def test_an_input_is_never_overwritten_under_another_name(tmp_path):
    path = write_set(tmp_path / "one.npz")
    os.symlink(path, tmp_path / "link.npz")
    os.link(path, tmp_path / "twin.NPZ")
    for other in ("one.npz", "link.npz", "twin.NPZ", "../" + tmp_path.name + "/one.npz"):
        with pytest.raises(ArgumentError, match="overwrite"):
            check_output(str(tmp_path / other), ".npz", path)
    check_output(str(tmp_path / "new.NPZ"), ".npz", path)


def test_records_of_the_current_folder_have_its_name(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path / "images")
    assert os.path.basename(record_path(None, ".", "scores")) == "images.scores.json"


def test_a_reference_replaces_only_an_earlier_one_of_the_same_images(command, tmp_path):
    one, two, output = write_set(tmp_path / "one.npz"), write_set(tmp_path / "two.npz", 9), tmp_path / "ref.npz"
    assert command("evaluate", "reference", one, *PIXELS, "--output", output)[0] == 0
    assert command("evaluate", "reference", one, *PIXELS, "--output", output)[0] == 0
    status, _, err = command("evaluate", "reference", two, *PIXELS, "--output", output)
    assert status == 2 and f"--output {output}" in err and "--overwrite" in err
    status, _, err = command("evaluate", "reference", one, *PIXELS, "--output", two)
    assert status == 2 and f"--output {two}" in err
    status, out, err = command("evaluate", "reference", two, *PIXELS, "--output", output, "--overwrite")
    assert status == 0 and "9 images" in out, err


# ---------------------------------------------------------------- mistyped words

@pytest.mark.parametrize("typed, meant", [("scor", "score"), ("Score", "score"), ("refrence", "reference"),
                                          ("NLL", "nll"), ("dif", "diff")])
def test_a_mistyped_command_is_told_which_is_meant(command, tmp_path, monkeypatch, typed, meant):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("evaluate", typed, "x.npz", "--reference", "y.npz")
    assert status == 2 and f"Did you mean {meant}?" in err
    (tmp_path / typed).mkdir()  # a folder of this name is taken for samples, as before
    status, _, err = command("evaluate", typed, "--reference", "y.npz", *PIXELS)
    assert status == 2 and "Did you mean" not in err


def test_a_mistyped_feature_space_is_told_which_is_meant():
    with pytest.raises(ArgumentError, match="pixels") as caught:
        load_feature_space("Pixel", torch.device("cpu"))
    assert caught.value.arguments == dict(features="Pixel")


# ---------------------------------------------------------------- values that cannot be

@pytest.mark.parametrize("flags, names", [
    (["reference", "digits", "--image-size", 9, "--output", "r.npz"], "--image-size 9: "),
    (["reference", "digits", "--image-size", 10**7, "--output", "r.npz"], "--image-size 10000000: "),
    (["reference", "digits", "--num-classes", 3, "--output", "r.npz"], "--num-classes 3: "),
    (["reference", "", "--output", "r.npz"], "DATA"),
    (["score", "digits", "--reference", "digits-held-out", "--features", ""], "--features"),
    (["score", "digits", "--reference", " "], "--reference"),
])
def test_values_without_effect_or_sense_are_refused(command, tmp_path, monkeypatch, flags, names):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("evaluate", *flags)
    assert status == 2 and names in err and "Traceback" not in err and not os.listdir(tmp_path), err


@pytest.mark.parametrize("flag", ["--num-fid-samples", "--per-proc-batch-size"])
def test_more_than_the_memory_holds_is_told_before_the_work(score, tmp_path, checkpoint, flag):
    save_checkpoint(str(tmp_path / "a.pt"), checkpoint)
    flags = ["--num-fid-samples", 10**13] if flag == "--per-proc-batch-size" else []
    status, out, _ = score(tmp_path / "a.pt", "--reference", "digits-held-out", *PIXELS, *FEW, *flags, flag, 10**13)
    assert status == 2 and f"{flag} {10**13}: " in out and "memory" in out
