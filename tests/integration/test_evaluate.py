"""evaluate.py: samples of every kind against references of every kind, and the record of what was measured."""
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint_io import load_checkpoint, save_checkpoint
from common.files import read_npz_array
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
    """(count, H, W, 3) uint8: noise around a colour of its own."""
    random = np.random.default_rng(seed)
    return np.clip(random.normal(100 + 10 * seed, 30, (count, *shape)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets(folder):
    """Two .npz of small images."""
    paths = [str(folder / "one.npz"), str(folder / "two.npz")]
    for seed, path in enumerate(paths, start=1):
        np.savez(path, arr_0=images_of(70 + seed, seed), arr_1=np.zeros(70 + seed, dtype=np.int64))
    return paths


@pytest.fixture(scope="module")
def trained(folder):
    """A checkpoint of a DiT of the digits, hardly trained."""
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
    """run(*flags) -> the scores that evaluate.py recorded, and what it printed; run(..., fails=True) -> the error."""
    def run(*flags, fails=False):
        path = tmp_path / "record.json"
        status, out, err = command("evaluate", *flags, "--output", path)
        assert status == (2 if fails else 0), err
        if fails:
            assert "Traceback" not in err
            return err
        return json.loads(path.read_text()), out
    return run


def by_hand(one, two):
    """The Frechet distance of two arrays of images in the space of their pixels, with SciPy's root."""
    import scipy.linalg
    one, two = (images.reshape(len(images), -1) / 255.0 for images in (one, two))
    (mean_one, cov_one), (mean_two, cov_two) = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (one, two))
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    return ((mean_one - mean_two) ** 2).sum() + np.trace(cov_one + cov_two - 2 * root)


# ---------------------------------------------------------------- samples and references

def test_two_sets(run, sets):
    record, out = run(sets[0], "--reference", sets[1], *PIXELS)
    one, two = images_of(71, 1), images_of(72, 2)
    want = precision_recall(*(torch.from_numpy(images).flatten(1) / 255 for images in (one, two)))
    assert abs(record["scores"]["frechet_distance"] - by_hand(one, two)) < 1e-5
    assert (record["scores"]["precision"], record["scores"]["recall"]) == pytest.approx(want)
    assert "fid" not in record["scores"] and "FID" not in out
    assert "Frechet distance (pixels, 71 images)" in out and "precision: " in out


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_batch_size_does_not_matter(run, sets, batch):
    scores = [run(sets[0], "--reference", sets[1], *PIXELS, "--per-proc-batch-size", size)[0]["scores"]
              for size in (32, batch)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_folder_is_as_good_as_an_npz(run, sets, tmp_path):
    """Images in the order of their paths, folders within folders."""
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


def test_folders_are_told_apart_by_their_pixels(children, sets, tmp_path):
    """The same names with other pixels are another hash; another number of processes is not."""
    hashes = []
    for name, count, seeds in (("a", 1, [1, 2, 3]), ("a", 2, [1, 2, 3]), ("b", 1, [1, 2, 4]), ("c", 1, [2, 1, 3])):
        (tmp_path / name).mkdir(exist_ok=True)
        for i, seed in enumerate([*seeds, 7, 8]):
            Image.fromarray(picture(4, 4, 3, seed=seed)).save(tmp_path / name / f"{i}.png")
        children.run("evaluate", tmp_path / name, "--reference", sets[0], *PIXELS, "--per-proc-batch-size", 2,
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
def test_images_of_several_sizes(run, sets, tmp_path, batch):
    """Are found whatever the batches; a folder as reference is cropped to a folder of samples."""
    for name, sizes in (("mixed", [4] * 4 + [8] * 4), ("small", [4] * 5), ("large", [12] * 5)):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(picture(size, size, 3, seed=i)).save(tmp_path / name / f"{i}.png")
    err = run(tmp_path / "mixed", "--reference", sets[0], *PIXELS, "--per-proc-batch-size", batch, fails=True)
    assert "4.png has 8 x 8 pixels, others have 4 x 4: pass --image-size" in err
    record, _ = run(tmp_path / "small", "--reference", tmp_path / "large", *PIXELS)
    assert record["reference"]["image_size"] == 4


def test_images_are_scaled_for_a_reference(run, sets, tmp_path):
    """A folder of pictures is cropped to the size of the samples, or to --image-size."""
    (tmp_path / "photos").mkdir()
    for seed in range(9):
        Image.fromarray(picture(20 + seed, 30, 3, seed=seed)).save(tmp_path / "photos" / f"{seed}.png")
    run(sets[0], "--reference", tmp_path / "photos", *PIXELS)
    err = run(tmp_path / "photos", "--reference", sets[0], *PIXELS, fails=True)
    assert "pixels, others have" in err and "pass --image-size" in err
    run(tmp_path / "photos", "--reference", sets[0], *PIXELS, "--image-size", 4)
    (tmp_path / "photos" / "4.png").write_bytes(b"spoilt")
    assert f"cannot read the image {tmp_path}/photos/4.png" in run(
        tmp_path / "photos", "--reference", sets[0], *PIXELS, "--image-size", 4, fails=True)


def test_a_reference_that_was_made(command, run, sets, tmp_path):
    status, out, err = command("evaluate", "--make-reference", sets[1], *PIXELS, "--output", tmp_path / "ref.npz")
    assert status == 0 and "72 images, 48 features (pixels)" in out, err
    (direct, _), (made, _) = (run(sets[0], "--reference", ref, *PIXELS) for ref in (sets[1], tmp_path / "ref.npz"))
    assert direct["scores"] == pytest.approx(made["scores"], abs=1e-12)
    assert made["reference"]["images"] == 72 and made["reference"]["source"]["sha256"] == direct["reference"]["sha256"]


def test_inception_and_adm_statistics(command, run, sets, inception, tmp_path):
    """A file as ADM publishes it gives what its images give; without `arr_0` there is no precision, without `mu_s` no
    sFID."""
    flags = ["--inception", inception]
    for name, images in (("samples", images_of(6, 1)), ("real", images_of(7, 2))):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    status, _, err = command("evaluate", "--make-reference", tmp_path / "real.npz", *flags, "--output",
                             tmp_path / "own.npz")
    assert status == 0, err
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
    assert "holds statistics of Inception features, --features is pixels" in err
    err = run(sets[0], "--reference", tmp_path / "own.npz", *PIXELS, fails=True)
    assert "was made in another feature space" in err


def spoilt(tmp_path, **arrays):
    rows = np.random.default_rng(0).standard_normal((60, 48))
    good = dict(mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False), features=rows.astype(np.float32),
                record=np.frombuffer(json.dumps(dict(features=dict(space="pixels", range="0 .. 1"), images=60,
                                                     source={})).encode(), dtype=np.uint8))
    np.savez(tmp_path / "ref.npz", **{name: array for name, array in (good | arrays).items() if array is not None})
    return tmp_path / "ref.npz"


@pytest.mark.parametrize("arrays, sentence", [
    (dict(sigma=None), "no .npz with sigma in it"),
    (dict(sigma=np.array([None, 1])), "sigma is not a plain array"),
    (dict(sigma=np.zeros((48, 47))), r"mu and sigma have the shapes (48,) and (48, 47), not (D,) and (D, D)"),
    (dict(mu=np.zeros((48, 1))), "not (D,) and (D, D)"),
    (dict(mu=np.full(48, np.nan)), "mu does not consist of finite numbers"),
    (dict(mu=np.zeros(48, dtype=np.int64)), "mu does not consist of finite numbers"),
    (dict(features=np.array(["x"])), "features does not consist of finite numbers"),
    (dict(record=np.frombuffer(b"no record", dtype=np.uint8)), "its record cannot be read"),
    (dict(sigma=-np.eye(48)), "sigma is no covariance"),
    (dict(sigma=np.triu(np.ones((48, 48)))), "sigma is no covariance"),
    (dict(mu=np.full(48, 1e200)), "the frechet_distance comes out as inf"),
    (dict(record=np.frombuffer(b"[" * 100000, dtype=np.uint8)), "its record cannot be read"),
    (dict(mu=np.zeros(12), sigma=np.eye(12), features=None), "the reference has 12 numbers an image, the samples have"),
    (dict(features=np.zeros((60, 12), dtype=np.float32)), "mu has 48 numbers, features has the shape (60, 12)"),
])
def test_references_that_are_spoilt(run, sets, tmp_path, arrays, sentence):
    assert "frechet_distance" in run(sets[0], "--reference", spoilt(tmp_path), *PIXELS)[0]["scores"]
    assert sentence in run(sets[0], "--reference", spoilt(tmp_path, **arrays), *PIXELS, fails=True)


@pytest.mark.parametrize("images, sentence", [
    (np.zeros((9, 4, 4, 3)), "arr_0 is float64 of the shape (9, 4, 4, 3), not uint8 of (N, H, W, 3)"),
    (np.zeros((9, 3, 4, 4), dtype=np.uint8), "not uint8 of (N, H, W, 3)"),
    (np.zeros((9, 48), dtype=np.uint8), "not uint8 of (N, H, W, 3)"),
    (np.array([None] * 9), "arr_0 is not a plain array"),
    (np.zeros((0, 4, 4, 3), dtype=np.uint8), "holds no images: arr_0 is empty"),
])
def test_samples_that_are_none(run, sets, tmp_path, images, sentence):
    np.savez(tmp_path / "bad.npz", arr_0=images)
    assert sentence in run(tmp_path / "bad.npz", "--reference", sets[0], *PIXELS, fails=True)


# ---------------------------------------------------------------- checkpoints

FEW = ["--num-fid-samples", 16, "--per-proc-batch-size", 4, "--num-sampling-steps", "ddim3", "--cfg-scale", 2]


def test_what_does_not_fit_is_told_before_sampling(run, trained, sets, monkeypatch):
    monkeypatch.setattr(GeneratedImages, "batch", lambda *_: pytest.fail("samples were made"))
    err = run(trained, "--reference", sets[0], *PIXELS, *FEW, fails=True)
    assert "the reference has 48 numbers an image, the samples have 192" in err
    err = run(trained, "--reference", "digits", *PIXELS, *FEW, "--num-fid-samples", 3, fails=True)
    assert "3 samples are too few" in err


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_what_may_mislead_is_told(run, sets, tmp_path):
    """Few images on either side; sizes that differ where the features do not mind."""
    _, out = run("digits", "--reference", sets[0], "--features", module_of(tmp_path, Spoils("fine")))
    assert "WARNING: the samples have 8 x 8 pixels, the reference has 4 x 4" in out
    np.savez(tmp_path / "few.npz", arr_0=images_of(40, 2))
    _, out = run(sets[0], "--reference", tmp_path / "few.npz", *PIXELS)
    assert "WARNING: 40 images of the reference in 48 dimensions" in out and "71 samples in" not in out


def test_the_folder_of_a_run_is_no_set_of_images(run, trained, sets):
    err = run(os.path.dirname(os.path.dirname(trained)), "--reference", sets[0], *PIXELS, fails=True)
    assert "is the folder of a run: name one of its checkpoints" in err


def test_a_checkpoint_is_sampled_and_measured(command, run, trained, tmp_path):
    """The images are those that sample_ddp.py writes, whose record says the same of them."""
    command("sample_ddp", "--ckpt", trained, *FEW, "--sample-dir", tmp_path / "samples")
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


def test_a_changed_set_has_no_record(command, run, trained, tmp_path):
    """What is written beside a set holds for that file, not for another one under its name."""
    command("sample_ddp", "--ckpt", trained, *FEW, "--sample-dir", tmp_path / "samples")
    (npz,) = (tmp_path / "samples").glob("*.npz")
    np.savez(npz, arr_0=np.array(read_npz_array(str(npz), "arr_0"))[::-1], arr_1=np.zeros(16, dtype=np.int64))
    assert "made" not in run(npz, "--reference", "digits", *PIXELS)[0]["samples"]


def test_balanced_labels(command, trained, tmp_path):
    command("sample_ddp", "--ckpt", trained, *FEW, "--labels", "balanced", "--sample-dir", tmp_path)
    (npz,) = tmp_path.glob("*labels-balanced*.npz")
    assert read_npz_array(str(npz), "arr_1").tolist() == [i % 10 for i in range(16)]


def test_processes_do_not_matter(children, trained, sets, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        out = children.run("evaluate", trained, "--reference", "digits-held-out", *PIXELS, *FEW, "--output",
                           tmp_path / f"{name}.json", processes=count)
        children.run("evaluate", sets[0], "--reference", sets[1], *PIXELS, "--output", tmp_path / f"{name}-set.json",
                     processes=count)
        assert out.count("Frechet distance") == 1
    for kind in ("", "-set"):
        one, two = (json.loads((tmp_path / f"{name}{kind}.json").read_text())["scores"] for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-7)  # 16 images in 192 dimensions: roots of zeros


def test_file_sets_do_not_depend_on_processes(children, sets, tmp_path):
    """Nor does the order of what is kept: rows of all processes come in the order of the images."""
    results = []
    for count in (1, 2, 3):
        children.run("evaluate", "--make-reference", sets[0], *PIXELS, "--per-proc-batch-size", 5, "--output",
                     tmp_path / "ref.npz", processes=count)
        with np.load(tmp_path / "ref.npz") as arrays:
            results.append({name: arrays[name] for name in ("mu", "sigma", "features")})
    rows = images_of(71, 1).reshape(71, -1).astype(np.float32) / 255
    for found in results:
        np.testing.assert_array_equal(found["features"], rows)
        np.testing.assert_allclose(found["mu"], rows.mean(axis=0, dtype=np.float64), rtol=1e-9)
        np.testing.assert_allclose(found["sigma"], np.cov(rows.astype(np.float64), rowvar=False), atol=1e-9)


def test_a_large_reference_keeps_some_features(command, sets, tmp_path, monkeypatch):
    """Statistics of all images; features for precision and recall of so many, at equal distances."""
    import evaluate
    monkeypatch.setattr(evaluate, "PRECISION_IMAGES", 10)
    status, _, err = command("evaluate", "--make-reference", sets[0], *PIXELS, "--output", tmp_path / "ref.npz")
    assert status == 0, err
    with np.load(tmp_path / "ref.npz") as arrays:
        rows = images_of(71, 1).reshape(71, -1).astype(np.float32) / 255
        np.testing.assert_array_equal(arrays["features"], rows[[0, 7, 15, 23, 31, 38, 46, 54, 62, 70]])
        np.testing.assert_allclose(arrays["mu"], rows.mean(axis=0, dtype=np.float64), rtol=1e-9)


class Spoils(torch.nn.Module):
    """Features that are not finite, or of another size, from some image on; or none."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, images):
        rows = images.double().mean(dim=(2, 3))
        if self.how == "nan":
            return rows / (rows - rows)
        if self.how == "none":
            return rows[:, :0]
        if self.how == "fine":
            return rows
        return rows[:, : 2 if images.shape[0] == 7 else 3]


def module_of(folder, module):
    path = folder / "module.pt"
    torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("how, sentence", [
    ("nan", "the features of the images 0 .. 7 are not finite"), ("none", "gives 0 numbers an image"),
    ("changing", "gives 2 numbers an image, and 3 before")])
def test_features_that_are_spoilt(run, sets, tmp_path, how, sentence):
    assert sentence in run(sets[0], "--reference", sets[1], "--features", module_of(tmp_path, Spoils(how)),
                           "--per-proc-batch-size", 8, fails=True)


def test_a_spoilt_model(command, run, trained, tmp_path):
    """Weights that are not finite make no black images, and no score."""
    state = load_checkpoint(trained)
    state["ema"]["final_layer.linear.bias"] = torch.full_like(state["ema"]["final_layer.linear.bias"], float("nan"))
    save_checkpoint(str(tmp_path / "spoilt.pt"), state)
    assert "the model makes images that are not finite" in run(
        tmp_path / "spoilt.pt", "--reference", "digits", *PIXELS, *FEW, fails=True)
    status, _, err = command("sample_ddp", "--ckpt", tmp_path / "spoilt.pt", *FEW, "--sample-dir", tmp_path)
    assert status == 2 and "the model makes images that are not finite" in err


def test_more_processes_than_images(children, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images_of(5, 1))
    np.savez(tmp_path / "b.npz", arr_0=images_of(40, 2))
    out = children.run("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *PIXELS, processes=6)
    assert "(pixels, 5 images)" in out and (tmp_path / "a.scores.json").exists()


def test_an_error_on_one_process_ends_all(children, sets, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(picture(4, 4, 3, seed=i)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "5.png").write_bytes(b"spoilt")
    out = children.run("evaluate", tmp_path / "images", "--reference", sets[0], *PIXELS, processes=2, status=2)
    assert out.count("error:") == 1 and "cannot read the image" in out and "Traceback" not in out


# ---------------------------------------------------------------- bits per dimension

def test_bits_per_dimension(command, trained, tmp_path):
    """A record, a plot, and a line that says what it is a bound of."""
    status, out, err = command("evaluate", trained, "--nll", "digits-held-out", "--nll-images", 3, "--output",
                               tmp_path / "nll.json")
    assert status == 0 and re.search(r"bits per dimension of pixels \(bound; 3 images, 1,000 timesteps\)", out), err
    record = json.loads((tmp_path / "nll.json").read_text())
    found = record["likelihood"]
    assert len(found["per_timestep"]) == 1000 and record["model"]["step"] == 20
    assert found["bits_per_dimension"] == pytest.approx(sum(found["per_timestep"]) + found["prior"])
    with Image.open(tmp_path / "nll.png") as plot:
        assert plot.width > 1000


def test_bits_of_images_that_do_not_fit(command, trained, image_folder):
    status, _, err = command("evaluate", trained, "--nll", image_folder)
    assert status == 2 and "the data has images of 8 pixels and 3 channels" in err


@pytest.mark.parametrize("flags, sentence", [
    (["one.npz", "--nll", "digits"], "--nll is of a checkpoint (.pt, .safetensors); one.npz is none"),
    (["CKPT", "--nll", "nothing"], "--nll nothing: there is no such folder")])
def test_mistakes_with_bits(command, trained, flags, sentence):
    status, _, err = command("evaluate", *(trained if flag == "CKPT" else flag for flag in flags))
    assert status == 2 and sentence in err and "--data-path" not in err, err


# ---------------------------------------------------------------- names and records

class Standard:
    is_standard, device, class_logits = True, "cpu", None


def test_what_a_distance_is_called():
    """FID-50K is 50,000 images in the standard space, and nothing else."""
    from evaluation.features import PixelFeatures
    assert distance_name(Standard(), 50000) == "FID-50K"
    assert distance_name(Standard(), 10000) == "FID-10K"
    assert distance_name(Standard(), 1234) == "FID-1234"
    assert "FID" not in distance_name(PixelFeatures("cpu"), 50000)
    rows = np.random.default_rng(0).standard_normal((9, 3))
    one = FeatureStatistics(9, (rows.mean(axis=0), np.cov(rows, rowvar=False)), features=torch.from_numpy(rows))
    assert set(compute_scores(one, one, Standard())) == {"fid", "precision", "recall"}


def test_records_lie_beside_the_samples(command, sets):
    """A second one does not overwrite the first."""
    paths = []
    for _ in range(2):
        status, out, err = command("evaluate", sets[0], "--reference", sets[1], *PIXELS)
        assert status == 0, err
        paths.append(re.search(r"wrote (\S+)", out)[1])
    assert [os.path.basename(path) for path in paths] == ["one.scores.json", "one.scores-2.json"]
    assert all(os.path.dirname(path) == os.path.dirname(sets[0]) for path in paths)


def test_two_records_are_compared(command, run, trained, tmp_path):
    for scale in (1, 2):
        record, _ = run(trained, "--reference", "digits-held-out", *PIXELS, *FEW, "--cfg-scale", scale)
        (tmp_path / f"{scale}.json").write_text(json.dumps(record))
    status, out, err = command("evaluate", "--diff", tmp_path / "1.json", tmp_path / "2.json")
    assert status == 0, err
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["samples.made.cfg_scale"] == "1.0 | 2.0" and lines["samples.made.model_calls"] == "3 | 6"
    assert next(iter(lines)).startswith("scores.") and "samples.made.seed" not in lines
    status, out, _ = command("evaluate", "--diff", tmp_path / "1.json", tmp_path / "1.json")
    assert out == "the records do not differ\n"


def test_a_record_says_what_was_used(run, sets):
    record, _ = run(sets[0], "--reference", sets[1], *PIXELS)
    assert len(record["samples"]["sha256"]) == len(record["reference"]["sha256"]) == 64
    made = record["evaluated"]
    assert made["versions"]["torch"] == torch.__version__.split("+")[0] and "torch-fidelity" in made["versions"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", made["commit"]) and made["tf32"] is False
    assert made["command"].startswith("evaluate.py ") and made["device"].startswith("cpu")


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, sentence", [
    ([], "pass one of --reference, --make-reference, --nll and --diff, not none"),
    (["x.npz"], "pass one of --reference"),
    (["x.npz", "--reference", "y", "--nll", "digits"], "not --reference and --nll"),
    (["--reference", "y"], "--reference needs SAMPLES"),
    (["x.npz", "--diff", "a", "b"], "--diff takes no SAMPLES, here are x.npz"),
    (["--make-reference", "digits"], "--make-reference needs --output"),
    (["--make-reference", "digits", "--output", "x.json"], "--output x.json: its name must end in .npz"),
    (["x.npz", "--reference", "digits", "--output", "x.npz"], "--output x.npz: its name must end in .json"),
    (["x.pt", "--nll", "digits", "--output", "x.png"], "--output x.png: its name must end in .json"),
    (["--make-reference", "x.npz", "--output", "./x.npz"], "would overwrite what is to be measured"),
    (["x.npz", "--reference", "digits", "--cfg-scale", "2"], "--cfg-scale says how a checkpoint's images are made"),
    (["x.npz", "--reference", "digits", "--cfg-interval", "0", "9"], "--cfg-interval says how a checkpoint's images"),
    (["x.pt", "--nll", "digits", "--precision", "bf16"], "--precision says how images are made, and --nll makes none"),
    (["x.npz", "--reference", "digits", "--output", "/nowhere/x.json"], "--output /nowhere/x.json: there is no folder"),
    (["x.npz", "--reference", "digits", "--features", "pixels"], "there is neither a file nor a folder x.npz"),
    (["digits", "--reference", "nothing.npz", "--features", "pixels"], "neither a file nor a folder nothing.npz"),
    (["x.pt", "--reference", "digits", "--features", "pixels"], "x.pt"),
    (["digits", "--reference", "digits", "--features", "what"], "--features what: neither inception"),
    (["--diff", "a", "b"], "a is no record of a measurement"),
])
def test_mistakes(command, monkeypatch, tmp_path, flags, sentence):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("evaluate", *flags)
    assert status == 2 and sentence in err and "Traceback" not in err, err


def test_a_folder_without_images(run, sets, tmp_path):
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
def test_published_numbers(run, batch):
    """OpenAI's sample batches against its references, by its evaluation suite."""
    reference, fid, sfid, inception_score, precision, recall = PUBLISHED[batch]
    found = run(os.path.join(ADM, batch), "--reference", os.path.join(ADM, reference))[0]["scores"]
    assert found["fid"] == pytest.approx(fid, abs=0.01) and found["sfid"] == pytest.approx(sfid, abs=0.02)
    assert found["inception_score"] == pytest.approx(inception_score, rel=2e-3)
    assert found["precision"] == pytest.approx(precision, abs=3e-3)
    assert found["recall"] == pytest.approx(recall, abs=3e-3)
