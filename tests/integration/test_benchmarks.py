"""Benchmarks: their baselines compute the same, and their commands print and store rows."""
import json

import numpy as np
import pytest
import torch

import benchmarks.train
import models
from benchmarks.diffusion_overhead import PlainFormulas
from common.compute import ComputeConfig
from diffusion import create_diffusion


def test_plain_formulas_compute_the_same():
    diffusion = create_diffusion("")
    plain = PlainFormulas(diffusion)
    x, output = torch.randn(4, 4, 8, 8), torch.randn(4, 8, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    torch.manual_seed(1)
    expected = plain.sample_step(output, x, t)
    torch.manual_seed(1)
    sample = diffusion.p_sample(lambda *_: output, x, t, clip_denoised=False)["sample"]
    assert np.allclose(sample, expected, rtol=1e-5, atol=1e-5)
    noise = torch.randn_like(x)
    losses = diffusion.training_losses(lambda *_: output, x, t, noise=noise)["loss"]
    assert torch.allclose(losses, plain.losses(output, x, t, noise), rtol=1e-5)


@pytest.mark.parametrize("name, flags, rows", [
    ("train", ["--ablation"], ["published recipe", "no flags", "+ --precision bf16", "+ --fused-adamw: --fast"]),
    ("train", [], ["published recipe", "no flags", "+ --fused-adamw: --fast"]),
    ("sample", ["--steps", 3], ["published loop", "no flags", "+ --precision bf16: --fast"])])
def test_rows_of_speed_say_how_much_they_differ(command, tmp_path, monkeypatch, name, flags, rows):
    monkeypatch.setitem(models.DiT_models, "DiT-S/8", lambda **options: models.DiT(
        **dict(patch_size=8, hidden_size=16, depth=1, num_heads=2) | options))
    monkeypatch.setattr(benchmarks.train, "fastest_config", lambda device: ComputeConfig("bf16"))
    status, out, err = command(f"benchmarks.{name}", "--model", "DiT-S/8", "--batch", 2, "--image-size", 64,
                               "--warm-up", 1, "--count", 2, "--calls", 1, *flags, "--json", tmp_path / "x.json")
    assert status == 0, err
    record = json.loads((tmp_path / "x.json").read_text())
    results, difference = record["results"], "difference" if name == "sample" else "loss_difference"
    assert record["what"] == name and record["flags"]["batch"] == 2 and list(results) == rows
    assert results["no flags"][difference] == 0 and 0 < results[rows[-1]][difference] < 0.1
    assert all(row["lowest"] <= row["seconds"] <= row["highest"] and row["times_as_fast"] > 0
               for row in results.values())
    assert out.count("times as fast") == len(rows)


def test_overhead_is_measured_against_the_plain_formulas(command):
    status, out, err = command("benchmarks.diffusion_overhead", "--warm-up", 1, "--count", 1, "--calls", 1)
    assert status == 0, err
    assert out.count("ratio ") == 3


def test_cost_of_a_checkpoint(command, monkeypatch):
    small = models.DiT_models["DiT-S/8"]
    for name in ("DiT-B/2", "DiT-XL/2"):
        monkeypatch.setitem(models.DiT_models, name, lambda: small(depth=1, hidden_size=16, num_heads=2))
    status, out, err = command("benchmarks.checkpointing")
    assert status == 0, err
    assert out.count("restore_s ") == 2 and out.count("async_copy_s ") == 1
