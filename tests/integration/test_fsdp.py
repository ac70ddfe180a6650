"""--fsdp: the results and files of DDP, with a shard of the state on each rank."""
import os
import re
from functools import partial

import pytest
import torch

import models
from common import distributed
from helpers import DIGITS, SpoilLoss, raises_argument
from run_files import STATE, differences, folder_of, scalars, stored
from training.checkpoint_manager import CheckpointManager
from training.fsdp import has_only_linear_weights, init_mesh, to_local

RUN = [*DIGITS, "--depth", 3, "--lr", 1e-3, "--ema-decay", 0.9, "--class-dropout-prob", 0.5, "--log-every", 1,
       "--ckpt-every", 3, "--max-grad-norm", 0.3, "--schedule-sampler", "loss-second-moment"]


class ReportShards:
    """Let each rank print at its end which share of the state it holds, and how often it was compiled.

    With `ranks_per_node`, a rank takes that for the size of its node.
    """

    def __init__(self, ranks_per_node=None):
        self.ranks_per_node = ranks_per_node

    def __call__(self, rank):
        if self.ranks_per_node:
            os.environ["LOCAL_WORLD_SIZE"] = str(self.ranks_per_node)
        torch.compile = partial(torch.compile, backend="eager")  # traces, but needs no C++ compiler
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
    """Return {rank: (share, sum)} as `ReportShards` printed last."""
    return {int(rank): (float(share), total)
            for rank, share, total in re.findall(rf"^(\d) {name} (\S+) (\S+)$", out, re.MULTILINE)}


def assert_close(one, two, step, tolerance=2e-5):
    """Compare checkpoints of two runs: names, shapes and types exactly, values up to rounding."""
    one, two = stored(one, step), stored(two, step)
    assert one["opt"]["param_groups"] == two["opt"]["param_groups"]
    pairs = [(one[part], two[part]) for part in ("model", "ema")]
    assert one["opt"]["state"].keys() == two["opt"]["state"].keys()
    pairs += [(moments, two["opt"]["state"][i]) for i, moments in one["opt"]["state"].items()]
    for left, right in pairs:
        assert list(left) == list(right) and {type(value) for value in right.values()} == {torch.Tensor}
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=tolerance)


def test_fsdp_equals_ddp_and_each_resumes_the_other(children, run_ok, tmp_path):
    reference = tmp_path / "held-out.npz"
    run_ok("evaluate", "--make-reference", "digits-held-out", "--features", "pixels", "--output", reference)
    extra = ["--fsdp", "--async-save", "--sample-every", 3, "--eval-every", 3, "--eval-reference", reference,
            "--eval-features", "pixels", "--eval-samples", 65, "--eval-sampling-steps", "ddim2"]
    children.run("train", *RUN, "--max-steps", 6, "--results-dir", tmp_path / "ddp", processes=2)
    out = children.run("train", *RUN, *extra, "--max-steps", 6, "--results-dir", tmp_path / "fsdp", processes=2,
                       prepare=ReportShards())
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", 3)
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", 6)
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
                           processes=count, prepare=ReportShards())
        assert "at step 3" in out and ("graphs 0 breaks 0" in out) == (flags != compiled) and "breaks 1" not in out
        assert_close(tmp_path / "ddp", tmp_path / name, 6)
    assert differences(stored(tmp_path / "fsdp", 6), stored(tmp_path / "again", 6)) == []
    out = run_ok("sample", "--ckpt", path, "--num-sampling-steps", "ddim2", "--output", tmp_path / "x.png")
    assert "ema weights of DiT-S/2 after 3 steps" in out


@pytest.mark.parametrize("where, count", [("all", 2), ("node", 4)])
def test_gathering_in_bf16_equals_autocast(children, tmp_path, where, count):
    """With accumulated gradients; the replicas of two nodes of two ranks stay equal."""
    flags = [*RUN, "--max-steps", 3, "--grad-accum-steps", 2, "--precision", "bf16", "--fused-adamw"]
    children.run("train", *flags, "--results-dir", tmp_path / "ddp", processes=count)
    out = children.run("train", *flags, "--fsdp", where, "--results-dir", tmp_path / "fsdp", processes=count,
                       prepare=ReportShards(ranks_per_node=2))
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", 3, tolerance=1e-4)
    for held in (shares(out, name) for name in ("weights", "moments", "ema")):
        assert len(held) == count and all(0.4 < share < 0.6 for share, _ in held.values())
        assert count == 2 or (held[0] == held[2] and held[1] == held[3] and held[0] != held[1])


def test_non_finite_step_of_one_rank_is_applied_by_none(children, tmp_path):
    out = children.run("train", *RUN, "--fsdp", "--ckpt-every", 1, "--max-steps", 3, "--results-dir", tmp_path,
                       processes=2, prepare=SpoilLoss([1], float("nan"), rank=1))
    one, two, three = (stored(tmp_path, step) for step in (1, 2, 3))
    assert [name for name in differences(one, two) if name.startswith(STATE)] == [] and two["guard"]["total"] == 1
    assert any(name.startswith("/model") for name in differences(two, three))
    assert all(torch.isfinite(weight).all() for weight in three["model"].values())
    assert "WARNING: (step=0000002) not applied, its gradient is non-finite" in out


def test_only_blocks_of_linear_layers_are_gathered_in_bf16():
    """Autocast does not convert other weights."""
    assert has_only_linear_weights(models.DiTBlock(16, 2))
    assert not has_only_linear_weights(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
    block = models.DiTBlock(16, 2)
    block.table = torch.nn.Parameter(torch.zeros(6, 16))
    assert not has_only_linear_weights(block)


@pytest.mark.parametrize("per_node", ["1", "3", "8", "x", None])
def test_nodes_need_equal_numbers_of_ranks(monkeypatch, per_node):
    monkeypatch.setattr(distributed, "assert_same_on_all_ranks", lambda *_: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node) if per_node else monkeypatch.delenv("LOCAL_WORLD_SIZE", False)
    with raises_argument(f"LOCAL_WORLD_SIZE.* {per_node or 'none'} of 4", fsdp="node"):
        init_mesh("node")


def test_full_average_takes_memory_only_while_it_is_sampled(children, tmp_path):
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
