"""evaluate.py: samples and references of every kind, the records of results, and former spellings of commands."""
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint_io import load_checkpoint, save_checkpoint
from common.files import read_npz_array
from evaluate import translate_former_spelling
from evaluation.feature_statistics import FeatureStatistics
from evaluation.features import load_feature_space
from evaluation.image_sources import GeneratedImages
from evaluation.metrics import precision_recall
from evaluation.reference import open_reference
from evaluation.scores import compute_scores, distance_name
from helpers import DIGITS, call, picture

PIXELS = ["--features", "pixels"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


def images_of(count, seed, shape=(4, 4, 3)):
    """Return noise around a color of the seed, shape (count, H, W, 3), uint8."""
    random = np.random.default_rng(seed)
    return np.clip(random.normal(100 + 10 * seed, 30, (count, *shape)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets(folder):
    """Two .npz of 4 x 4 images."""
    paths = [str(folder / "one.npz"), str(folder / "two.npz")]
    for seed, path in enumerate(paths, start=1):
        np.savez(path, arr_0=images_of(70 + seed, seed), arr_1=np.zeros(70 + seed, dtype=np.int64))
    return paths


@pytest.fixture(scope="module")
def trained(folder):
    """A checkpoint of a tiny DiT after 20 steps on the digits."""
    call("train", *DIGITS, "--max-steps", 20, "--lr", 0.01, "--ema-decay", 0.5, "--results-dir", folder / "runs")
    return str(next((folder / "runs").glob("000-*")) / "checkpoints" / "0000020.pt")


@pytest.fixture(scope="module")
def inception(folder):
    """A file of random weights for torch-fidelity's Inception."""
    from torchvision.models import inception_v3
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "inception.pth")
    return str(folder / "inception.pth")


@pytest.fixture
def run(command, tmp_path):
    """run(*flags) -> the record of `evaluate.py score`, and its output; run(..., fails=True) -> the error."""
    def run(*flags, fails=False):
        path = tmp_path / "record.json"
        status, out, err = command("evaluate", "score", *flags, "--output", path)
        assert status == (2 if fails else 0), err
        if fails:
            assert "Traceback" not in err
            return err
        return json.loads(path.read_text()), out
    return run


def scipy_pixel_distance(one, two):
    """Compute the Frechet distance of two arrays of images in pixel space with SciPy's matrix root."""
    import scipy.linalg
    one, two = (images.reshape(len(images), -1) / 255.0 for images in (one, two))
    (mean_one, cov_one), (mean_two, cov_two) = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (one, two))
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    return ((mean_one - mean_two) ** 2).sum() + np.trace(cov_one + cov_two - 2 * root)


# ---------------------------------------------------------------- samples and references

def test_scores_of_two_sets_agree_with_scipy(run, sets):
    record, out = run(sets[0], "--reference", sets[1], *PIXELS)
    one, two = images_of(71, 1), images_of(72, 2)
    want = precision_recall(*(torch.from_numpy(images).flatten(1) / 255 for images in (one, two)))
    assert abs(record["scores"]["frechet_distance"] - scipy_pixel_distance(one, two)) < 1e-5
    assert (record["scores"]["precision"], record["scores"]["recall"]) == pytest.approx(want)
    assert "fid" not in record["scores"] and "FID" not in out
    assert "Frechet distance (pixels, 71 images)" in out and "precision: " in out


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_scores_do_not_depend_on_the_batch_size(run, sets, batch):
    scores = [run(sets[0], "--reference", sets[1], *PIXELS, "--per-proc-batch-size", size)[0]["scores"]
              for size in (32, batch)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_folder_scores_as_an_npz_of_the_same_images(run, sets, tmp_path):
    for i, image in enumerate(images_of(71, 1)):
        path = tmp_path / "images" / f"{i // 10}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (one, _), (two, _) = (run(samples, "--reference", sets[1], *PIXELS) for samples in (sets[0], tmp_path / "images"))
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-12)
    assert len(two["samples"]["pixels_sha256"]) == 64 and "pixels_sha256" not in one["samples"]
    (other, _) = run(sets[1], "--reference", tmp_path / "images", *PIXELS)
    assert other["scores"]["precision"] == pytest.approx(one["scores"]["recall"])


def test_pixel_hash_depends_on_pixels_and_order_only(children, sets, tmp_path):
    hashes = []
    for name, count, seeds in (("a", 1, [1, 2, 3]), ("a", 2, [1, 2, 3]), ("b", 1, [1, 2, 4]), ("c", 1, [2, 1, 3])):
        (tmp_path / name).mkdir(exist_ok=True)
        for i, seed in enumerate([*seeds, 7, 8]):
            Image.fromarray(picture(4, 4, 3, seed=seed)).save(tmp_path / name / f"{i}.png")
        children.run("evaluate", "score", tmp_path / name, "--reference", sets[0], *PIXELS, "--per-proc-batch-size", 2,
                     "--output", tmp_path / "record.json", processes=count)
        hashes.append(json.loads((tmp_path / "record.json").read_text())["samples"]["pixels_sha256"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_links_are_followed_once(run, sets, tmp_path):
    for i in range(5):
        (tmp_path / "images" / "inner").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(4, 4, 3, seed=i)).save(tmp_path / "images" / "inner" / f"{i}.png")
    (tmp_path / "images" / "inner" / "up").symlink_to(tmp_path / "images")
    assert run(tmp_path / "images", "--reference", sets[0], *PIXELS)[0]["samples"]["images"] == 5


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_images_of_several_sizes_are_refused_for_any_batch_size(run, sets, tmp_path, batch):
    for name, sizes in (("mixed", [4] * 4 + [8] * 4), ("small", [4] * 5), ("large", [12] * 5)):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(picture(size, size, 3, seed=i)).save(tmp_path / name / f"{i}.png")
    err = run(tmp_path / "mixed", "--reference", sets[0], *PIXELS, "--per-proc-batch-size", batch, fails=True)
    assert "4.png has 8 x 8 pixels" in err and "--image-size" in err
    record, _ = run(tmp_path / "small", "--reference", tmp_path / "large", *PIXELS)
    assert record["reference"]["image_size"] == 4


def test_folders_are_cropped_to_the_image_size(run, sets, tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        Image.fromarray(picture(20 + seed, 30, 3, seed=seed)).save(tmp_path / "photos" / f"{seed}.png")
    run(sets[0], "--reference", tmp_path / "photos", *PIXELS)
    err = run(tmp_path / "photos", "--reference", sets[0], *PIXELS, fails=True)
    assert "pixels" in err and "--image-size" in err
    run(tmp_path / "photos", "--reference", sets[0], *PIXELS, "--image-size", 4)
    (tmp_path / "photos" / "4.png").write_bytes(b"spoilt")
    assert f"cannot read the image {tmp_path}/photos/4.png" in run(
        tmp_path / "photos", "--reference", sets[0], *PIXELS, "--image-size", 4, fails=True)


def test_a_saved_reference_scores_as_its_images(run_ok, run, sets, tmp_path):
    out = run_ok("evaluate", "reference", sets[1], *PIXELS, "--output", tmp_path / "ref.npz")
    assert "72 images, 48 features (pixels)" in out
    (direct, _), (made, _) = (run(sets[0], "--reference", ref, *PIXELS) for ref in (sets[1], tmp_path / "ref.npz"))
    assert direct["scores"] == pytest.approx(made["scores"], abs=1e-12)
    assert made["reference"]["images"] == 72 and made["reference"]["source"]["sha256"] == direct["reference"]["sha256"]


def test_adm_statistics_agree_with_their_images(run_ok, run, sets, inception, tmp_path):
    """Without `arr_0` there is no precision, without `mu_s` no sFID."""
    flags = ["--inception", inception]
    for name, images in (("samples", images_of(6, 1)), ("real", images_of(7, 2))):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    run_ok("evaluate", "reference", tmp_path / "real.npz", *flags, "--output", tmp_path / "own.npz")
    with np.load(tmp_path / "own.npz") as own:
        statistics = {name: own[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", **statistics, arr_0=images_of(7, 2))
    np.savez(tmp_path / "bare.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    features = load_feature_space("inception", torch.device("cpu"), inception)
    real, own, adm, bare = (open_reference(str(tmp_path / f"{name}.npz"), features, 4)[0]
                            for name in ("real", "own", "adm", "bare"))
    for other in (own, adm):
        for one, two in zip((*real.pool, *real.spatial, real.features), (*other.pool, *other.spatial, other.features)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert bare.spatial is None and bare.features is None
    record, out = run(tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", *flags)
    assert set(record["scores"]) == {"frechet_distance", "spatial_frechet_distance", "inception_score",
                                     "inception_score_std", "precision", "recall"}
    assert "inception with other weights" in out and "FID" not in out and "the covariance is singular" in out
    err = run(sets[0], "--reference", tmp_path / "adm.npz", *PIXELS, fails=True)
    assert f"--reference {tmp_path}/adm.npz: " in err and "pixels" in err
    err = run(sets[0], "--reference", tmp_path / "own.npz", *PIXELS, fails=True)
    assert f"--reference {tmp_path}/own.npz: " in err and "pixels" in err


def write_reference(tmp_path, **arrays):
    """Write a reference of 60 images, with some of its arrays replaced, or left out if None."""
    rows = np.random.default_rng(0).standard_normal((60, 48))
    good = dict(mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False), features=rows.astype(np.float32),
                record=np.frombuffer(json.dumps(dict(features=dict(space="pixels", range="0 .. 1"), images=60,
                                                     source={})).encode(), dtype=np.uint8))
    np.savez(tmp_path / "ref.npz", **{name: array for name, array in (good | arrays).items() if array is not None})
    return tmp_path / "ref.npz"


@pytest.mark.parametrize("arrays, problem", [
    (dict(sigma=None), "sigma"),
    (dict(sigma=np.array([None, 1])), "sigma"),
    (dict(sigma=np.zeros((48, 47))), "(48, 47)"),
    (dict(mu=np.zeros((48, 1))), "(48, 1)"),
    (dict(mu=np.full(48, np.nan)), "mu does not consist of finite numbers"),
    (dict(mu=np.zeros(48, dtype=np.int64)), "mu does not consist of finite numbers"),
    (dict(features=np.array(["x"])), "features does not consist of finite numbers"),
    (dict(record=np.frombuffer(b"no record", dtype=np.uint8)), "its record cannot be read"),
    (dict(sigma=-np.eye(48)), "sigma is not a covariance"),
    (dict(sigma=np.triu(np.ones((48, 48)))), "sigma is not a covariance"),
    (dict(mu=np.full(48, 1e200)), "frechet_distance is inf"),
    (dict(record=np.frombuffer(b"[" * 100000, dtype=np.uint8)), "its record cannot be read"),
    (dict(mu=np.zeros(12), sigma=np.eye(12), features=None), "the reference has 12 numbers"),
    (dict(features=np.zeros((60, 12), dtype=np.float32)), "mu has 48 numbers"),
])
def test_damaged_references_are_refused(run, sets, tmp_path, arrays, problem):
    assert "frechet_distance" in run(sets[0], "--reference", write_reference(tmp_path), *PIXELS)[0]["scores"]
    assert problem in run(sets[0], "--reference", write_reference(tmp_path, **arrays), *PIXELS, fails=True)


@pytest.mark.parametrize("images, problem", [
    (np.zeros((9, 4, 4, 3)), "float64"),
    (np.zeros((9, 3, 4, 4), dtype=np.uint8), "(N, H, W, 3)"),
    (np.zeros((9, 48), dtype=np.uint8), "(N, H, W, 3)"),
    (np.array([None] * 9), "arr_0"),
    (np.zeros((0, 4, 4, 3), dtype=np.uint8), "holds no images"),
])
def test_arrays_that_are_not_images_are_refused(run, sets, tmp_path, images, problem):
    np.savez(tmp_path / "bad.npz", arr_0=images)
    assert problem in run(tmp_path / "bad.npz", "--reference", sets[0], *PIXELS, fails=True)


# ---------------------------------------------------------------- checkpoints

FEW = ["--num-fid-samples", 16, "--per-proc-batch-size", 4, "--num-sampling-steps", "ddim3", "--cfg-scale", 2]


def test_samples_that_do_not_fit_the_reference_are_refused_before_sampling(run, trained, sets, monkeypatch):
    monkeypatch.setattr(GeneratedImages, "batch", lambda *_: pytest.fail("samples were made"))
    err = run(trained, "--reference", sets[0], *PIXELS, *FEW, fails=True)
    assert "48 numbers" in err and "192" in err
    err = run(trained, "--reference", "digits", *PIXELS, *FEW, "--num-fid-samples", 3, fails=True)
    assert "--num-fid-samples 3: " in err


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_misleading_distances_are_warned_of(run, sets, tmp_path):
    _, out = run("digits", "--reference", sets[0], "--features", save_module(tmp_path, DamagedFeatures("fine")))
    assert "WARNING: the samples have 8 x 8 pixels, the reference has 4 x 4" in out
    np.savez(tmp_path / "few.npz", arr_0=images_of(40, 2))
    _, out = run(sets[0], "--reference", tmp_path / "few.npz", *PIXELS)
    assert "WARNING: 40 reference images in 48 dimensions" in out and "71 samples in" not in out


def test_the_folder_of_a_run_is_refused(run, trained, sets):
    err = run(os.path.dirname(os.path.dirname(trained)), "--reference", sets[0], *PIXELS, fails=True)
    assert "is the folder of a run" in err


def test_samples_of_a_checkpoint_are_those_of_sample_ddp(run_ok, run, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW, "--sample-dir", tmp_path / "samples")
    (npz,) = (tmp_path / "samples").glob("*.npz")
    before = sorted(os.listdir(os.path.dirname(trained)))
    (direct, out), (written, _) = (run(*samples, "--reference", "digits-held-out", *PIXELS, "--per-proc-batch-size", 4)
                                   for samples in ([trained, *FEW], [npz]))
    assert direct["scores"] == pytest.approx(written["scores"], abs=1e-12)
    assert "ema weights of DiT-S/2 after 20 steps" in out and sorted(os.listdir(os.path.dirname(trained))) == before
    made = direct["samples"]["made"]
    assert made.items() >= dict(sampler="ddim", steps=3, model_calls=6, cfg_scale=2.0, cfg_channels=1, in_channels=1,
                                vae="none", weights="ema", ema_decay=0.5, step=20, precision="tf32", tf32=False,
                                labels="uniform", seed=0, uint8="clamp(127.5 x + 128, 0, 255), truncated").items()
    same = {name: value for name, value in made.items() if name not in ("command", "date")}
    assert written["samples"]["made"].items() >= same.items()
    assert direct["samples"]["images"] == written["samples"]["images"] == 16


def test_metadata_of_a_set_is_ignored_if_the_set_has_changed(run_ok, run, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW, "--sample-dir", tmp_path / "samples")
    (npz,) = (tmp_path / "samples").glob("*.npz")
    np.savez(npz, arr_0=np.array(read_npz_array(str(npz), "arr_0"))[::-1], arr_1=np.zeros(16, dtype=np.int64))
    assert "made" not in run(npz, "--reference", "digits", *PIXELS)[0]["samples"]


def test_balanced_labels_are_equally_many(run_ok, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW, "--label-distribution", "balanced", "--sample-dir", tmp_path)
    (npz,) = tmp_path.glob("*labels-balanced*.npz")
    assert read_npz_array(str(npz), "arr_1").tolist() == [i % 10 for i in range(16)]


def test_scores_do_not_depend_on_the_number_of_ranks(children, trained, sets, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        out = children.run("evaluate", "score", trained, "--reference", "digits-held-out", *PIXELS, *FEW, "--output",
                           tmp_path / f"{name}.json", processes=count)
        children.run("evaluate", "score", sets[0], "--reference", sets[1], *PIXELS, "--output",
                     tmp_path / f"{name}-set.json", processes=count)
        assert out.count("Frechet distance") == 1
    for kind in ("", "-set"):
        one, two = (json.loads((tmp_path / f"{name}{kind}.json").read_text())["scores"] for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-7)  # 16 images in 192 dimensions: roots of zeros


def test_references_do_not_depend_on_the_number_of_ranks(children, sets, tmp_path):
    results = []
    for count in (1, 2, 3):
        children.run("evaluate", "reference", sets[0], *PIXELS, "--per-proc-batch-size", 5, "--output",
                     tmp_path / "ref.npz", processes=count)
        with np.load(tmp_path / "ref.npz") as arrays:
            results.append({name: arrays[name] for name in ("mu", "sigma", "features")})
    rows = images_of(71, 1).reshape(71, -1).astype(np.float32) / 255
    for found in results:
        np.testing.assert_array_equal(found["features"], rows)
        np.testing.assert_allclose(found["mu"], rows.mean(axis=0, dtype=np.float64), rtol=1e-9)
        np.testing.assert_allclose(found["sigma"], np.cov(rows.astype(np.float64), rowvar=False), atol=1e-9)


def test_a_large_reference_keeps_evenly_spaced_features(run_ok, sets, tmp_path, monkeypatch):
    import evaluate
    monkeypatch.setattr(evaluate, "NUM_REFERENCE_FEATURES", 10)
    run_ok("evaluate", "reference", sets[0], *PIXELS, "--output", tmp_path / "ref.npz")
    with np.load(tmp_path / "ref.npz") as arrays:
        rows = images_of(71, 1).reshape(71, -1).astype(np.float32) / 255
        np.testing.assert_array_equal(arrays["features"], rows[[0, 7, 15, 23, 31, 38, 46, 54, 62, 70]])
        np.testing.assert_allclose(arrays["mu"], rows.mean(axis=0, dtype=np.float64), rtol=1e-9)


class DamagedFeatures(torch.nn.Module):
    """Features that are not finite, of changing size, or empty."""

    def __init__(self, damage: str):
        super().__init__()
        self.damage = damage

    def forward(self, images):
        rows = images.double().mean(dim=(2, 3))
        if self.damage == "nan":
            return rows / (rows - rows)
        if self.damage == "none":
            return rows[:, :0]
        if self.damage == "fine":
            return rows
        return rows[:, : 2 if images.shape[0] == 7 else 3]


def save_module(folder, module):
    path = folder / "module.pt"
    torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("damage, problem", [
    ("nan", "0 .. 7 are not finite"), ("none", "0 numbers"), ("changing", "2 numbers")])
def test_damaged_features_are_refused(run, sets, tmp_path, damage, problem):
    features = save_module(tmp_path, DamagedFeatures(damage))
    flags = ["--features", features, "--per-proc-batch-size", 8]
    assert problem in run(sets[0], "--reference", sets[1], *flags, fails=True)


def test_a_model_with_non_finite_weights_is_not_scored(run_error, run, trained, tmp_path):
    state = load_checkpoint(trained)
    state["ema"]["final_layer.linear.bias"] = torch.full_like(state["ema"]["final_layer.linear.bias"], float("nan"))
    save_checkpoint(str(tmp_path / "spoilt.pt"), state)
    assert "the model makes images that are not finite" in run(
        tmp_path / "spoilt.pt", "--reference", "digits", *PIXELS, *FEW, fails=True)
    err = run_error("sample_ddp", "--ckpt", tmp_path / "spoilt.pt", *FEW, "--sample-dir", tmp_path)
    assert "the model makes images that are not finite" in err


def test_more_ranks_than_images(children, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images_of(5, 1))
    np.savez(tmp_path / "b.npz", arr_0=images_of(40, 2))
    out = children.run("evaluate", "score", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *PIXELS, processes=6)
    assert "(pixels, 5 images)" in out and (tmp_path / "a.scores.json").exists()


def test_an_error_on_one_rank_ends_all(children, sets, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(picture(4, 4, 3, seed=i)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "5.png").write_bytes(b"spoilt")
    out = children.run("evaluate", "score", tmp_path / "images", "--reference", sets[0], *PIXELS, processes=2, status=2)
    assert out.count("error:") == 1 and "cannot read the image" in out and "Traceback" not in out


# ---------------------------------------------------------------- bits per dimension

def test_nll_writes_a_record_and_a_plot(run_ok, trained, tmp_path):
    out = run_ok("evaluate", "nll", trained, "--data", "digits-held-out", "--num-images", 3,
                 "--output", tmp_path / "nll.json")
    assert re.search(r"bits per dimension of pixels \(bound; 3 images, 1,000 timesteps\)", out)
    record = json.loads((tmp_path / "nll.json").read_text())
    found = record["likelihood"]
    assert len(found["per_timestep"]) == 1000 and record["model"]["step"] == 20
    assert found["bits_per_dimension"] == pytest.approx(sum(found["per_timestep"]) + found["prior"])
    with Image.open(tmp_path / "nll.png") as plot:
        assert plot.width > 1000


def test_nll_refuses_data_of_another_shape(run_error, trained, image_folder):
    assert "8 pixels and 3 channels" in run_error("evaluate", "nll", trained, "--data", image_folder)


def test_nll_names_the_flag_of_a_missing_folder(run_error, trained):
    assert "--data nothing: " in run_error("evaluate", "nll", trained, "--data", "nothing")


# ---------------------------------------------------------------- names and records

class StandardSpace:
    is_standard, device, class_logits, predict_class = True, "cpu", None, None


def test_only_distances_in_the_standard_space_are_called_fid():
    from evaluation.features import PixelFeatures
    assert distance_name(StandardSpace(), 50000) == "FID-50K"
    assert distance_name(StandardSpace(), 10000) == "FID-10K"
    assert distance_name(StandardSpace(), 1234) == "FID-1234"
    assert "FID" not in distance_name(PixelFeatures("cpu"), 50000)
    rows = np.random.default_rng(0).standard_normal((9, 3))
    one = FeatureStatistics(9, (rows.mean(axis=0), np.cov(rows, rowvar=False)), features=torch.from_numpy(rows))
    assert set(compute_scores(one, one, StandardSpace())) == {"fid", "precision", "recall"}


def test_records_are_written_beside_the_samples_and_never_overwritten(run_ok, sets):
    paths = []
    for _ in range(2):
        out = run_ok("evaluate", "score", sets[0], "--reference", sets[1], *PIXELS)
        paths.append(re.search(r"wrote (\S+)", out)[1])
    assert [os.path.basename(path) for path in paths] == ["one.scores.json", "one.scores-2.json"]
    assert all(os.path.dirname(path) == os.path.dirname(sets[0]) for path in paths)


def test_diff_lists_the_fields_that_differ(command, run_ok, run, trained, tmp_path):
    for scale in (1, 2):
        record, _ = run(trained, "--reference", "digits-held-out", *PIXELS, *FEW, "--cfg-scale", scale)
        (tmp_path / f"{scale}.json").write_text(json.dumps(record))
    out = run_ok("evaluate", "diff", tmp_path / "1.json", tmp_path / "2.json")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["samples.made.cfg_scale"] == "1.0 | 2.0" and lines["samples.made.model_calls"] == "3 | 6"
    assert next(iter(lines)).startswith("scores.") and "samples.made.seed" not in lines
    status, out, _ = command("evaluate", "diff", tmp_path / "1.json", tmp_path / "1.json")
    assert out == "the records do not differ\n"


def test_a_record_holds_hashes_and_environment(run, sets):
    record, _ = run(sets[0], "--reference", sets[1], *PIXELS)
    assert len(record["samples"]["sha256"]) == len(record["reference"]["sha256"]) == 64
    made = record["evaluated"]
    assert made["versions"]["torch"] == torch.__version__.split("+")[0] and "torch-fidelity" in made["versions"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", made["commit"]) and made["tf32"] is False
    assert made["command"].startswith("evaluate.py ") and made["device"].startswith("cpu")


# ---------------------------------------------------------------- command lines

@pytest.mark.parametrize("former, present", [
    (["x.npz", "--reference", "r", "--eta", "0"], ["score", "x.npz", "--reference", "r", "--eta", "0"]),
    (["--reference=r", "x.npz"], ["score", "--reference", "r", "x.npz"]),
    (["--make-reference", "d", "--output", "o"], ["reference", "d", "--output", "o"]),
    (["--image-size", "8", "--make-reference=d"], ["reference", "--image-size", "8", "d"]),
    (["c.pt", "--nll", "d", "--nll-images", "9"], ["nll", "c.pt", "--data", "d", "--nll-images", "9"]),
    (["--diff", "a", "b"], ["diff", "a", "b"]),
    (["score", "x.npz", "--reference", "r"], ["score", "x.npz", "--reference", "r"]),
    (["x.npz"], ["x.npz"]), (["--help"], ["--help"]), ([], []),
])
def test_former_spellings_are_translated_to_commands(former, present):
    assert translate_former_spelling(former) == present


def test_former_spellings_and_flags_give_the_same_results(run_ok, run, trained, sets, tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    record, _ = run(sets[0], "--reference", sets[1], *PIXELS, "--dist-timeout", 5)
    run_ok("evaluate", "reference", sets[1], *PIXELS, "--output", f"{new}.npz")
    run_ok("evaluate", "nll", trained, "--data", "digits-held-out", "--num-images", 1, "--output", f"{new}.json")
    for flags in ([sets[0], "--reference", sets[1], *PIXELS, "--timeout", 5, "--output", f"{old}-scores.json"],
                  ["--make-reference", sets[1], *PIXELS, "--output", f"{old}.npz"],
                  [trained, "--nll", "digits-held-out", "--nll-images", 1, "--output", f"{old}.json"]):
        run_ok("evaluate", *flags)
    assert json.loads((tmp_path / "old-scores.json").read_text())["scores"] == record["scores"]
    results = [json.loads((tmp_path / name).read_text())["likelihood"] for name in ("new.json", "old.json")]
    assert results[0] == results[1]
    with np.load(f"{new}.npz") as one, np.load(f"{old}.npz") as two:
        assert set(one) == set(two)
        assert all(np.array_equal(one[name], two[name]) for name in ("mu", "sigma", "features"))


@pytest.mark.parametrize("flags, problem", [
    ([], "COMMAND"),
    (["x.npz"], "invalid choice: 'x.npz'"),
    (["score", "x.npz"], "--reference"),
    (["score", "--reference", "y"], "SAMPLES"),
    (["reference", "digits"], "--output"),
    (["nll", "x.pt"], "--data"),
    (["diff", "a"], "RECORD"),
    (["reference", "digits", "--output", "x.npz", "--cfg-scale", "2"], "evaluate.py reference: error: unrecognized"),
    (["nll", "x.pt", "--data", "digits", "--precision", "bf16"], "evaluate.py nll: error: unrecognized"),
    (["x.npz", "--reference", "y", "--nll", "digits"], "--nll"),
    (["reference", "digits", "--output", "x.json"], "--output x.json: "),
    (["score", "x.npz", "--reference", "digits", "--output", "x.npz"], "--output x.npz: "),
    (["nll", "x.pt", "--data", "digits", "--output", "x.png"], "--output x.png: "),
    (["reference", "x.npz", "--output", "./x.npz"], "--output ./x.npz: "),
    (["score", "x.npz", "--reference", "digits", "--output", "/nowhere/x.json"], "--output /nowhere/x.json: "),
    (["score", "x.npz", "--reference", "digits", "--cfg-scale", "2"], "--cfg-scale"),
    (["score", "x.npz", "--reference", "digits", "--cfg-interval", "0", "9"], "--cfg-interval"),
    (["score", "x.npz", "--reference", "digits", "--labels", "balanced"], "--label-distribution"),
    (["score", "x.npz", "--reference", "digits", "--num-classes", "3"], "--num-classes"),
    (["score", "x.npz", "--reference", "digits", "--features", "pixels"], "x.npz"),
    (["score", "digits", "--reference", "nothing.npz", "--features", "pixels"], "nothing.npz"),
    (["score", "x.pt", "--reference", "digits", "--features", "pixels"], "x.pt"),
    (["score", "digits", "--reference", "digits", "--features", "what"], "--features what: "),
    (["score", "digits", "--reference", "digits", "--features", "pixels", "--inception", "w"], "--inception w: "),
    (["nll", "one.npz", "--data", "digits"], "one.npz"),
    (["diff", "a", "b"], "a is not a record"),
])
def test_mistakes_name_the_flag_or_file(run_error, monkeypatch, tmp_path, flags, problem):
    monkeypatch.chdir(tmp_path)
    assert problem in run_error("evaluate", *flags)


@pytest.mark.parametrize("name, flags, others", [
    ("score", ["--cfg-scale", "--label-distribution", "--features"], ["--data ", "--num-images"]),
    ("reference", ["--features", "--image-size"], ["--cfg-scale", "--global-seed", "--vae"]),
    ("nll", ["--num-images", "--global-seed", "--vae"], ["--cfg-scale", "--features", "--precision"]),
    ("diff", ["RECORD"], ["--output"]),
])
def test_help_of_a_command_lists_its_flags_only(run_ok, name, flags, others):
    out = run_ok("evaluate", name, "--help")
    assert all(flag in out for flag in flags) and not any(flag in out for flag in others)
    assert "--timeout" not in out and "--labels" not in out and "--nll-images" not in out


def test_a_folder_without_images_is_refused(run, sets, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in run(tmp_path / "empty", "--reference", sets[0], *PIXELS, fails=True)


# ---------------------------------------------------------------- ADM's own numbers

PUBLISHED = {
    "admnet_guided_imagenet128.npz": ("VIRTUAL_imagenet128_labeled.npz", 2.973, 5.09, 141.48, 0.781, 0.593),
    "admnet_guided_upsampled_imagenet256.npz": (
        "VIRTUAL_imagenet256_labeled.npz", 3.943, 6.140, 215.84, 0.8265, 0.5309),
}
ADM = os.environ.get("ADM_BATCHES", "")


@pytest.mark.skipif(not ADM, reason="needs OpenAI's sample batches: ADM_BATCHES=folder, and Inception's weights")
@pytest.mark.parametrize("batch", PUBLISHED)
def test_openai_sample_batches_score_as_published(run, batch):
    reference, fid, sfid, inception_score, precision, recall = PUBLISHED[batch]
    found = run(os.path.join(ADM, batch), "--reference", os.path.join(ADM, reference))[0]["scores"]
    assert found["fid"] == pytest.approx(fid, abs=0.01) and found["sfid"] == pytest.approx(sfid, abs=0.02)
    assert found["inception_score"] == pytest.approx(inception_score, rel=2e-3)
    assert found["precision"] == pytest.approx(precision, abs=3e-3)
    assert found["recall"] == pytest.approx(recall, abs=3e-3)
