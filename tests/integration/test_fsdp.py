"""--fsdp: what DDP computes, of which each process keeps a part; the same files."""
import os
import re
from functools import partial

import pytest
import torch

from common import distributed
from common.errors import ArgumentError
from helpers import DIGITS, Spoils, differences, folder_of, scalars, stored
from training.checkpoint_manager import CheckpointManager
from training.fsdp import has_only_linear_weights, init_mesh, to_local

RUN = [*DIGITS, "--depth", 3, "--lr", 1e-3, "--ema-decay", 0.9, "--class-dropout-prob", 0.5, "--log-every", 1,
       "--ckpt-every", 3, "--max-grad-norm", 0.3, "--schedule-sampler", "loss-second-moment"]


class Watched:
    """Has each process say at the end of its run which share of everything it holds, and what was compiled."""

    def __init__(self, a_node=None):
        self.a_node = a_node

    def __call__(self, rank):
        if self.a_node:
            os.environ["LOCAL_WORLD_SIZE"] = str(self.a_node)
        torch.compile = partial(torch.compile, backend="eager")  # whether it can be traced, without a C++ compiler
        wait = CheckpointManager.wait

        def wait_and_report(checkpoints):
            wait(checkpoints)
            parts = checkpoints.stateful
            moments = [value for moments in parts["opt"].optimizer.state.values() for value in moments.values()
                       if value.ndim]
            for name, tensors in (("weights", list(parts["model"].model.parameters())), ("moments", moments),
                                  ("ema", list(parts["ema"].model.parameters()))):
                local = [to_local(tensor.detach()) for tensor in tensors]
                print(f"{rank} {name} {sum(t.numel() for t in local) / max(1, sum(t.numel() for t in tensors)):.3f} "
                      f"{torch.cat([t.double().flatten() for t in local]).sum() if local else 0}", flush=True)
            counters = torch._dynamo.utils.counters
            print(f"{rank} graphs {counters['stats']['unique_graphs']} "
                  f"breaks {sum(counters['graph_break'].values())}", flush=True)

        CheckpointManager.wait = wait_and_report


def shares(out, name):
    """{rank: (share, sum)} as `Watched` said last."""
    return {int(rank): (float(share), total)
            for rank, share, total in re.findall(rf"^(\d) {name} (\S+) (\S+)$", out, re.MULTILINE)}


def check_alike(one, two, step, tolerance=2e-5):
    """Checkpoints of two runs: the same names, shapes and types, and values but for rounding."""
    one, two = stored(one, step), stored(two, step)
    assert one["opt"]["param_groups"] == two["opt"]["param_groups"]
    pairs = [(one[part], two[part]) for part in ("model", "ema")]
    assert one["opt"]["state"].keys() == two["opt"]["state"].keys()
    pairs += [(moments, two["opt"]["state"][i]) for i, moments in one["opt"]["state"].items()]
    for ours, theirs in pairs:
        assert list(ours) == list(theirs) and {type(value) for value in theirs.values()} == {torch.Tensor}
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=tolerance)


def test_as_ddp_and_back(children, command, tmp_path):
    """Losses, weights, EMA, moments; cut and resumed bit for bit; either goes on from the other's checkpoint."""
    watched = Watched()
    reference = tmp_path / "held-out.npz"
    command("evaluate", "reference", "digits-held-out", "--features", "pixels", "--output", reference)
    more = ["--fsdp", "--async-save", "--sample-every", 3, "--eval-every", 3, "--eval-reference", reference,
            "--eval-features", "pixels", "--eval-samples", 65, "--eval-sampling-steps", "ddim2"]
    children.run("train", *RUN, "--max-steps", 6, "--results-dir", tmp_path / "ddp", processes=2)
    out = children.run("train", *RUN, *more, "--max-steps", 6, "--results-dir", tmp_path / "fsdp", processes=2,
                       prepare=watched)
    check_alike(tmp_path / "ddp", tmp_path / "fsdp", 3)
    check_alike(tmp_path / "ddp", tmp_path / "fsdp", 6)
    ddp, fsdp = scalars(tmp_path / "ddp"), scalars(tmp_path / "fsdp")
    assert len(ddp) == 6 and max(abs(ddp[step] - fsdp[step]) for step in ddp) < 1e-5
    norms = [scalars(tmp_path / name, "train/grad_norm") for name in ("ddp", "fsdp")]
    assert max(abs(norms[0][step] / norms[1][step] - 1) for step in ddp) < 1e-4 and max(norms[0].values()) > 0.3
    for name in ("weights", "moments", "ema"):
        assert all(0.4 < share < 0.6 for share, _ in shares(out, name).values()) and len(shares(out, name)) == 2, out
    assert "the evaluation failed" not in out
    folder = folder_of(tmp_path / "fsdp")
    assert len(list((folder / "samples").iterdir())) == 2 and (folder / "checkpoints" / "best.pt").is_file()

    compiled = ["--fsdp", "--compile", "--grad-checkpointing", 0.5]
    for name, source, flags, count in (("again", "fsdp", ["--fsdp"], 2), ("from-ddp", "ddp", compiled, 2),
                                       ("to-one", "fsdp", [], 1)):
        path = folder_of(tmp_path / source) / "checkpoints" / "0000003.pt"
        out = children.run("train", *RUN, *flags, "--max-steps", 6, "--resume", path, "--results-dir", tmp_path / name,
                           processes=count, prepare=watched)
        assert "at step 3" in out and ("graphs 0 breaks 0" in out) == (flags != compiled) and "breaks 1" not in out
        check_alike(tmp_path / "ddp", tmp_path / name, 6)
    assert differences(stored(tmp_path / "fsdp", 6), stored(tmp_path / "again", 6)) == []
    status, out, err = command(
        "sample", "--ckpt", path, "--num-sampling-steps", "ddim2", "--output", tmp_path / "x.png")
    assert status == 0 and "ema weights of DiT-S/2 after 3 steps" in out, out + err


@pytest.mark.parametrize("where, count", [("all", 2), ("node", 4)])
def test_accumulating_in_bf16(children, tmp_path, where, count):
    """Weights that travel as bfloat16 give what autocast gives; two nodes of two hold two copies that stay alike."""
    flags = [*RUN, "--max-steps", 3, "--grad-accum-steps", 2, "--precision", "bf16", "--fused-adamw"]
    children.run("train", *flags, "--results-dir", tmp_path / "ddp", processes=count)
    out = children.run("train", *flags, "--fsdp", where, "--results-dir", tmp_path / "fsdp", processes=count,
                       prepare=Watched(a_node=2))
    check_alike(tmp_path / "ddp", tmp_path / "fsdp", 3, tolerance=1e-4)
    found = {name: shares(out, name) for name in ("weights", "moments", "ema")}
    for held in found.values():
        assert len(held) == count and all(0.4 < share < 0.6 for share, _ in held.values())
        assert count == 2 or (held[0] == held[2] and held[1] == held[3] and held[0] != held[1])


def test_a_step_that_is_not_finite(children, tmp_path):
    """On one process: no process applies it."""
    out = children.run("train", *RUN, "--fsdp", "--ckpt-every", 1, "--max-steps", 3, "--results-dir", tmp_path,
                       processes=2, prepare=Spoils([1], float("nan"), rank=1))
    one, two, three = (stored(tmp_path, step) for step in (1, 2, 3))
    state = ("/model", "/ema", "/opt", "/schedule_sampler")
    assert [name for name in differences(one, two) if name.startswith(state)] == [] and two["guard"]["total"] == 1
    assert any(name.startswith("/model") for name in differences(two, three))
    assert all(torch.isfinite(weight).all() for weight in three["model"].values())
    assert "WARNING: (step=0000002) not applied, its gradient is non-finite" in out


def test_whose_blocks_travel_in_bf16():
    """Those of linear layers only: of others autocast makes no bfloat16."""
    import models
    assert has_only_linear_weights(models.DiTBlock(16, 2))
    assert not has_only_linear_weights(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
    block = models.DiTBlock(16, 2)
    block.table = torch.nn.Parameter(torch.zeros(6, 16))
    assert not has_only_linear_weights(block)


def test_fsdp_needs_several_ranks(command, tmp_path):
    status, _, err = command("train", *DIGITS, "--fsdp", "--results-dir", tmp_path / "results")
    assert status == 2 and "--fsdp all: a single process" in err
    assert not (tmp_path / "results").exists()
    status, _, err = command("train", *DIGITS, "--fsdp", "zero", "--results-dir", tmp_path / "results")
    assert status == 2 and "argument --fsdp: invalid choice: 'zero'" in err


@pytest.mark.parametrize("per_node", ["1", "3", "8", "x", None])
def test_nodes_need_equal_numbers_of_ranks(monkeypatch, per_node):
    monkeypatch.setattr(distributed, "assert_same_on_all_ranks", lambda *_: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node) if per_node else monkeypatch.delenv("LOCAL_WORLD_SIZE", False)
    with pytest.raises(ArgumentError, match=f"LOCAL_WORLD_SIZE.* {per_node or 'none'} of 4") as caught:
        init_mesh("node")
    assert caught.value.arguments == dict(fsdp="node")


def test_an_average_is_full_only_to_be_sampled(children, tmp_path):
    """Sharded, the module to sample from has no memory outside of the block that uses it."""
    out = children.run("train", *RUN, "--fsdp", "--max-steps", 2, "--results-dir", tmp_path, processes=2,
                       prepare=report_full_model)
    assert out.count("full model on {'meta'} outside, on {'cpu'} inside") == 2


def report_full_model(rank):
    import train

    def report(flags, signals, train_step, *rest):
        (ema,) = train_step.emas
        outside = {weight.device.type for weight in ema.full_model.parameters()}
        with ema.full() as full:
            inside = {weight.device.type for weight in full.parameters()}
        print(f"full model on {outside} outside, on {inside} inside", flush=True)

    train.train = report
