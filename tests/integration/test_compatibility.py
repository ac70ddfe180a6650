"""Files of an earlier version (commit 33b873f, November 2026) load, and give the same results."""
import shutil

import numpy as np
import pytest
import torch

from common.checkpoint_io import load_checkpoint
from data.latent_cache.reader import LatentCache, verify
from helpers import DIGITS, ROOT, TINY
from run_files import differences, pixels, stored

FIXTURES = ROOT / "tests" / "fixtures"
RUN = [*DIGITS, "--num-workers", 0, "--schedule-sampler", "loss-second-moment", "--max-steps", 6]


@pytest.fixture
def old_run(tmp_path):
    return shutil.copytree(FIXTURES / "run", tmp_path / "old")


def test_old_checkpoint_is_resumed_as_a_new_one(run_ok, old_run, tmp_path):
    """It was made after 3 steps, with flags under former names; rounding may differ between processors."""
    out = run_ok("train", *RUN, "--resume", "auto", "--results-dir", old_run)
    assert "at step 3" in out and out.count("WARNING") == out.count("WARNING: the EMA still holds")
    run_ok("train", *RUN, "--results-dir", tmp_path / "new")
    old, new = stored(old_run, 6), stored(tmp_path / "new", 6)
    for part in ("model", "ema"):
        for name, weight in new[part].items():
            torch.testing.assert_close(old[part][name], weight, rtol=1e-4, atol=1e-6)
    assert old["step"] == new["step"] and old["guard"] == new["guard"] and old["config"] == new["config"]
    assert torch.equal(old["schedule_sampler"]["counts"], new["schedule_sampler"]["counts"])


def test_names_in_checkpoints_are_unchanged(run_ok, old_run, tmp_path):
    run_ok("train", *RUN[:-1], 3, "--results-dir", tmp_path / "new")
    old, new = stored(old_run, 3), stored(tmp_path / "new", 3)
    assert old.keys() == new.keys() and old["config"] == new["config"]
    assert old["model"].keys() == new["model"].keys() and old["opt"].keys() == new["opt"].keys()
    assert old["opt"]["param_groups"] == new["opt"]["param_groups"]
    renamed = {"features_in_memory", "override", "timeout"}  # flags whose former names are aliases
    assert old["args"].keys() - new["args"].keys() == renamed
    assert {name: value for name, value in old["args"].items() if name not in renamed | {"results_dir", "max_steps",
            "ckpt_every", "log_every"}}.items() <= new["args"].items()


def test_old_checkpoint_gives_the_same_picture(run_ok, old_run, tmp_path):
    path = old_run / "000-DiT-S-2" / "checkpoints" / "0000003.pt"
    run_ok("sample", "--ckpt", path, "--num-sampling-steps", 10, "--cfg-scale", 2, "--output", tmp_path / "sample.png")
    old, new = pixels(FIXTURES / "sample.png"), pixels(tmp_path / "sample.png")
    assert old.shape == new.shape and abs(old - new).max() <= 1


def test_old_checkpoint_of_another_block_type_gives_the_same_samples(run_ok, tmp_path):
    run_ok("sample_ddp", "--ckpt", FIXTURES / "adaln-single.pt", "--num-sampling-steps", 4, "--cfg-scale", 1.5,
           "--num-fid-samples", 4, "--sample-dir", tmp_path)
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as new, np.load(FIXTURES / "adaln-single-samples.npz") as old:
        assert abs(old["arr_0"].astype(int) - new["arr_0"]).max() <= 1 and (old["arr_1"] == new["arr_1"]).all()


def test_old_latent_cache_can_be_trained_on(run_ok, tmp_path):
    cache = shutil.copytree(FIXTURES / "latent_cache", tmp_path / "latent_cache")
    assert verify(str(cache)) == [] and len(LatentCache(str(cache))) == 8
    run_ok("train", "--features-path", cache, *TINY, "--num-classes", 2, "--global-batch-size", 4, "--max-steps", 2,
           "--num-workers", 0, "--results-dir", tmp_path / "results")
    assert stored(tmp_path / "results", 2)["config"]["num_images"] == 8


def test_control_a_changed_weight_is_noticed(old_run):
    path = old_run / "000-DiT-S-2" / "checkpoints" / "0000003.pt"
    one, two = load_checkpoint(str(path)), load_checkpoint(str(path))
    two["ema"]["pos_embed"] = two["ema"]["pos_embed"] + 1e-3
    assert differences(one, two) == ["/ema/pos_embed"]
