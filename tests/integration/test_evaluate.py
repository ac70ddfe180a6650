"""evaluate.py score and reference: samples and references of every kind."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint_io import load_checkpoint, save_checkpoint
from common.files import read_npz_array
from evaluation.features import load_feature_space
from evaluation.image_sources import GeneratedImages
from evaluation.metrics import precision_recall
from evaluation.reference import open_reference
from helpers import FEW_SAMPLES, PIXELS
from run_files import images_of, picture, write_images, write_noise


def scipy_pixel_distance(one, two):
    import scipy.linalg
    one, two = (images.reshape(len(images), -1) / 255.0 for images in (one, two))
    (mean_one, cov_one), (mean_two, cov_two) = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (one, two))
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    return ((mean_one - mean_two) ** 2).sum() + np.trace(cov_one + cov_two - 2 * root)


def test_scores_of_two_sets_agree_with_scipy(score, sets):
    record, out = score(sets[0], "--reference", sets[1], *PIXELS)
    one, two = images_of(71, 1), images_of(72, 2)
    want = precision_recall(*(torch.from_numpy(images).flatten(1) / 255 for images in (one, two)))
    assert abs(record["scores"]["frechet_distance"] - scipy_pixel_distance(one, two)) < 1e-5
    assert (record["scores"]["precision"], record["scores"]["recall"]) == pytest.approx(want)
    assert "fid" not in record["scores"] and "FID" not in out
    assert "Frechet distance (pixels, 71 images)" in out and "precision: " in out


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_scores_do_not_depend_on_the_batch_size(score, sets, batch):
    scores = [score(sets[0], "--reference", sets[1], *PIXELS, "--per-proc-batch-size", size)[0]["scores"]
              for size in (32, batch)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_folder_scores_as_an_npz_of_the_same_images(score, sets, tmp_path):
    files = {f"{i // 10}/{i:03d}.png": Image.fromarray(image) for i, image in enumerate(images_of(71, 1))}
    write_images(tmp_path / "images", files | {"notes.txt": b"not an image"})
    (one, _), (two, _) = (score(samples, "--reference", sets[1], *PIXELS) for samples in (sets[0], tmp_path / "images"))
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-12)
    assert len(two["samples"]["pixels_sha256"]) == 64 and "pixels_sha256" not in one["samples"]
    (other, _) = score(sets[1], "--reference", tmp_path / "images", *PIXELS)
    assert other["scores"]["precision"] == pytest.approx(one["scores"]["recall"])


def test_pixel_hash_depends_on_pixels_and_order_only(children, sets, tmp_path):
    hashes = []
    for name, count, seeds in (("a", 1, [1, 2, 3]), ("a", 2, [1, 2, 3]), ("b", 1, [1, 2, 4]), ("c", 1, [2, 1, 3])):
        write_images(tmp_path / name, {f"{i}.png": Image.fromarray(picture(4, 4, 3, seed=seed))
                                       for i, seed in enumerate([*seeds, 7, 8])})
        children.run("evaluate", "score", tmp_path / name, "--reference", sets[0], *PIXELS, "--per-proc-batch-size", 2,
                     "--output", tmp_path / "record.json", processes=count)
        hashes.append(json.loads((tmp_path / "record.json").read_text())["samples"]["pixels_sha256"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_links_are_followed_once(score, sets, tmp_path):
    write_noise(tmp_path / "images" / "inner", 5, 4, 4, 3)
    (tmp_path / "images" / "inner" / "up").symlink_to(tmp_path / "images")
    assert score(tmp_path / "images", "--reference", sets[0], *PIXELS)[0]["samples"]["images"] == 5


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_images_of_several_sizes_are_refused_for_any_batch_size(score, sets, tmp_path, batch):
    write_noise(tmp_path / "small", 5, 4, 4, 3)
    write_noise(tmp_path / "large", 5, 12, 12, 3)
    write_noise(tmp_path / "mixed", 8, 8, 8, 3)
    write_noise(tmp_path / "mixed", 4, 4, 4, 3)  # 0 .. 3 are smaller
    err = score(tmp_path / "mixed", "--reference", sets[0], *PIXELS, "--per-proc-batch-size", batch, fails=True)
    assert "4.png has 8 x 8 pixels" in err and "--image-size" in err
    record, _ = score(tmp_path / "small", "--reference", tmp_path / "large", *PIXELS)
    assert record["reference"]["image_size"] == 4


def test_folders_are_cropped_to_the_image_size(score, sets, tmp_path):
    photos = write_images(tmp_path / "photos", {f"{i}.png": Image.fromarray(picture(20 + i, 30, 3, seed=i))
                                                for i in range(9)})
    score(sets[0], "--reference", photos, *PIXELS)
    err = score(photos, "--reference", sets[0], *PIXELS, fails=True)
    assert "pixels" in err and "--image-size" in err
    score(photos, "--reference", sets[0], *PIXELS, "--image-size", 4)
    (tmp_path / "photos" / "4.png").write_bytes(b"spoilt")
    err = score(photos, "--reference", sets[0], *PIXELS, "--image-size", 4, fails=True)
    assert f"cannot read the image {photos}/4.png" in err


def test_a_saved_reference_scores_as_its_images(run_ok, score, sets, tmp_path):
    out = run_ok("evaluate", "reference", sets[1], *PIXELS, "--output", tmp_path / "ref.npz")
    assert "72 images, 48 features (pixels)" in out
    (direct, _), (made, _) = (score(sets[0], "--reference", ref, *PIXELS) for ref in (sets[1], tmp_path / "ref.npz"))
    assert direct["scores"] == pytest.approx(made["scores"], abs=1e-12)
    assert made["reference"]["images"] == 72 and made["reference"]["source"]["sha256"] == direct["reference"]["sha256"]


def test_adm_statistics_agree_with_their_images(run_ok, score, sets, inception_weights, tmp_path):
    """Without `arr_0` there is no precision, without `mu_s` no sFID."""
    flags = ["--inception", inception_weights]
    for name, images in (("samples", images_of(6, 1)), ("real", images_of(7, 2))):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    run_ok("evaluate", "reference", tmp_path / "real.npz", *flags, "--output", tmp_path / "own.npz")
    with np.load(tmp_path / "own.npz") as own:
        statistics = {name: own[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", **statistics, arr_0=images_of(7, 2))
    np.savez(tmp_path / "bare.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    features = load_feature_space("inception", torch.device("cpu"), inception_weights)
    real, own, adm, bare = (open_reference(str(tmp_path / f"{name}.npz"), features, 4)[0]
                            for name in ("real", "own", "adm", "bare"))
    for other in (own, adm):
        for one, two in zip((*real.pool, *real.spatial, real.features), (*other.pool, *other.spatial, other.features)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert bare.spatial is None and bare.features is None
    record, out = score(tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", *flags)
    assert set(record["scores"]) == {"frechet_distance", "spatial_frechet_distance", "inception_score",
                                     "inception_score_std", "precision", "recall"}
    assert "inception with other weights" in out and "FID" not in out and "the covariance is singular" in out
    for name in ("adm.npz", "own.npz"):
        err = score(sets[0], "--reference", tmp_path / name, *PIXELS, fails=True)
        assert f"--reference {tmp_path}/{name}: " in err and "pixels" in err


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
def test_damaged_references_are_refused(score, sets, tmp_path, arrays, problem):
    assert "frechet_distance" in score(sets[0], "--reference", write_reference(tmp_path), *PIXELS)[0]["scores"]
    assert problem in score(sets[0], "--reference", write_reference(tmp_path, **arrays), *PIXELS, fails=True)


@pytest.mark.parametrize("images, problem", [
    (np.zeros((9, 4, 4, 3)), "float64"),
    (np.zeros((9, 3, 4, 4), dtype=np.uint8), "(N, H, W, 3)"),
    (np.zeros((9, 48), dtype=np.uint8), "(N, H, W, 3)"),
    (np.array([None] * 9), "arr_0"),
    (np.zeros((0, 4, 4, 3), dtype=np.uint8), "holds no images"),
])
def test_arrays_that_are_not_images_are_refused(score, sets, tmp_path, images, problem):
    np.savez(tmp_path / "bad.npz", arr_0=images)
    assert problem in score(tmp_path / "bad.npz", "--reference", sets[0], *PIXELS, fails=True)


def test_samples_that_do_not_fit_the_reference_are_refused_before_sampling(score, trained, sets, monkeypatch):
    monkeypatch.setattr(GeneratedImages, "batch", lambda *_: pytest.fail("samples were made"))
    err = score(trained, "--reference", sets[0], *PIXELS, *FEW_SAMPLES, fails=True)
    assert "48 numbers" in err and "192" in err
    err = score(trained, "--reference", "digits", *PIXELS, *FEW_SAMPLES, "--num-fid-samples", 3, fails=True)
    assert "--num-fid-samples 3: " in err


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_misleading_distances_are_warned_of(score, sets, tmp_path):
    _, out = score("digits", "--reference", sets[0], "--features", save_module(tmp_path, DamagedFeatures("fine")))
    assert "WARNING: the samples have 8 x 8 pixels, the reference has 4 x 4" in out
    np.savez(tmp_path / "few.npz", arr_0=images_of(40, 2))
    _, out = score(sets[0], "--reference", tmp_path / "few.npz", *PIXELS)
    assert "WARNING: 40 reference images in 48 dimensions" in out and "71 samples in" not in out


def test_folders_of_runs_or_without_images_are_refused(score, trained, sets, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, problem in ((os.path.dirname(os.path.dirname(trained)), "is the folder of a run"),
                            (tmp_path / "empty", "empty holds no images")):
        assert problem in score(folder, "--reference", sets[0], *PIXELS, fails=True)


def test_samples_of_a_checkpoint_are_those_of_sample_ddp(run_ok, score, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW_SAMPLES, "--sample-dir", tmp_path / "samples")
    (npz,) = (tmp_path / "samples").glob("*.npz")
    before = sorted(os.listdir(os.path.dirname(trained)))
    flags = ["--reference", "digits-held-out", *PIXELS, "--per-proc-batch-size", 4]
    (direct, out), (written, _) = score(trained, *FEW_SAMPLES, *flags), score(npz, *flags)
    assert direct["scores"] == pytest.approx(written["scores"], abs=1e-12)
    assert "ema weights of DiT-S/2 after 20 steps" in out and sorted(os.listdir(os.path.dirname(trained))) == before
    made = direct["samples"]["made"]
    assert made.items() >= dict(sampler="ddim", steps=3, model_calls=6, cfg_scale=2.0, cfg_channels=1, in_channels=1,
                                vae="none", weights="ema", ema_decay=0.5, step=20, precision="tf32", tf32=False,
                                labels="uniform", seed=0, uint8="clamp(127.5 x + 128, 0, 255), truncated").items()
    same = {name: value for name, value in made.items() if name not in ("command", "date")}
    assert written["samples"]["made"].items() >= same.items()
    assert direct["samples"]["images"] == written["samples"]["images"] == 16


def test_metadata_of_a_set_is_ignored_if_the_set_has_changed(run_ok, score, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW_SAMPLES, "--sample-dir", tmp_path / "samples")
    (npz,) = (tmp_path / "samples").glob("*.npz")
    np.savez(npz, arr_0=np.array(read_npz_array(str(npz), "arr_0"))[::-1], arr_1=np.zeros(16, dtype=np.int64))
    assert "made" not in score(npz, "--reference", "digits", *PIXELS)[0]["samples"]


def test_balanced_labels_are_equally_many(run_ok, trained, tmp_path):
    run_ok("sample_ddp", "--ckpt", trained, *FEW_SAMPLES, "--label-distribution", "balanced", "--sample-dir", tmp_path)
    (npz,) = tmp_path.glob("*labels-balanced*.npz")
    assert read_npz_array(str(npz), "arr_1").tolist() == [i % 10 for i in range(16)]


def test_scores_do_not_depend_on_the_number_of_ranks(children, trained, sets, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        out = children.run("evaluate", "score", trained, "--reference", "digits-held-out", *PIXELS, *FEW_SAMPLES,
                           "--output", tmp_path / f"{name}.json", processes=count)
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
def test_damaged_features_are_refused(score, sets, tmp_path, damage, problem):
    features = save_module(tmp_path, DamagedFeatures(damage))
    flags = ["--features", features, "--per-proc-batch-size", 8]
    assert problem in score(sets[0], "--reference", sets[1], *flags, fails=True)


def test_a_model_with_non_finite_weights_is_not_scored(run_error, score, trained, tmp_path):
    state = load_checkpoint(trained)
    state["ema"]["final_layer.linear.bias"] = torch.full_like(state["ema"]["final_layer.linear.bias"], float("nan"))
    save_checkpoint(str(tmp_path / "spoilt.pt"), state)
    assert "the model makes images that are not finite" in score(
        tmp_path / "spoilt.pt", "--reference", "digits", *PIXELS, *FEW_SAMPLES, fails=True)
    err = run_error("sample_ddp", "--ckpt", tmp_path / "spoilt.pt", *FEW_SAMPLES, "--sample-dir", tmp_path)
    assert "the model makes images that are not finite" in err


def test_more_ranks_than_images(children, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images_of(5, 1))
    np.savez(tmp_path / "b.npz", arr_0=images_of(40, 2))
    out = children.run("evaluate", "score", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *PIXELS, processes=6)
    assert "(pixels, 5 images)" in out and (tmp_path / "a.scores.json").exists()


def test_an_error_on_one_rank_ends_all(children, sets, tmp_path):
    write_noise(tmp_path / "images", 6, 4, 4, 3)
    (tmp_path / "images" / "5.png").write_bytes(b"spoilt")
    out = children.run("evaluate", "score", tmp_path / "images", "--reference", sets[0], *PIXELS, processes=2, status=2)
    assert out.count("error:") == 1 and "cannot read the image" in out and "Traceback" not in out
