"""evaluate.py: its commands and former spellings, the records it writes, and bits per dimension."""
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import translate_former_spelling
from evaluation.feature_statistics import FeatureStatistics
from evaluation.scores import compute_scores, distance_name
from helpers import FEW_SAMPLES, PIXELS


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


def test_former_spellings_and_flags_give_the_same_results(run_ok, score, trained, sets, tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    record, _ = score(sets[0], "--reference", sets[1], *PIXELS, "--dist-timeout", 5)
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


def test_diff_lists_the_fields_that_differ(run_ok, score, trained, tmp_path):
    for scale in (1, 2):
        record, _ = score(trained, "--reference", "digits-held-out", *PIXELS, *FEW_SAMPLES, "--cfg-scale", scale)
        (tmp_path / f"{scale}.json").write_text(json.dumps(record))
    out = run_ok("evaluate", "diff", tmp_path / "1.json", tmp_path / "2.json")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["samples.made.cfg_scale"] == "1.0 | 2.0" and lines["samples.made.model_calls"] == "3 | 6"
    assert next(iter(lines)).startswith("scores.") and "samples.made.seed" not in lines
    assert run_ok("evaluate", "diff", tmp_path / "1.json", tmp_path / "1.json") == "the records do not differ\n"


def test_a_record_holds_hashes_and_environment(score, sets):
    record, _ = score(sets[0], "--reference", sets[1], *PIXELS)
    assert len(record["samples"]["sha256"]) == len(record["reference"]["sha256"]) == 64
    made = record["evaluated"]
    assert made["versions"]["torch"] == torch.__version__.split("+")[0] and "torch-fidelity" in made["versions"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", made["commit"]) and made["tf32"] is False
    assert made["command"].startswith("evaluate.py ") and made["device"].startswith("cpu")


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


def test_nll_names_the_data_that_does_not_fit(run_error, trained, image_folder):
    for data, problem in ((image_folder, "8 pixels and 3 channels"), ("nothing", "--data nothing: ")):
        assert problem in run_error("evaluate", "nll", trained, "--data", data)


PUBLISHED = {
    "admnet_guided_imagenet128.npz": ("VIRTUAL_imagenet128_labeled.npz", 2.973, 5.09, 141.48, 0.781, 0.593),
    "admnet_guided_upsampled_imagenet256.npz": (
        "VIRTUAL_imagenet256_labeled.npz", 3.943, 6.140, 215.84, 0.8265, 0.5309),
}
ADM = os.environ.get("ADM_BATCHES", "")


@pytest.mark.skipif(not ADM, reason="needs OpenAI's sample batches: ADM_BATCHES=folder, and Inception's weights")
@pytest.mark.parametrize("batch", PUBLISHED)
def test_openai_sample_batches_score_as_published(score, batch):
    reference, fid, sfid, inception_score, precision, recall = PUBLISHED[batch]
    found = score(os.path.join(ADM, batch), "--reference", os.path.join(ADM, reference))[0]["scores"]
    assert found["fid"] == pytest.approx(fid, abs=0.01) and found["sfid"] == pytest.approx(sfid, abs=0.02)
    assert found["inception_score"] == pytest.approx(inception_score, rel=2e-3)
    assert found["precision"] == pytest.approx(precision, abs=3e-3)
    assert found["recall"] == pytest.approx(recall, abs=3e-3)
