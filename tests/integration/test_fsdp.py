"""--fsdp: what DDP computes, of which each process keeps a part; the same files."""
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common import distributed
from common.errors import UserError
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
        finish = CheckpointManager.finish

        def finish_and_tell(saver):
            finish(saver)
            state = saver.state
            moments = [value for moments in state.optimizer.state.values() for value in moments.values() if value.ndim]
            for name, tensors in (("weights", list(state.model.parameters())), ("moments", moments),
                                  ("ema", list(state.ema.model.parameters()))):
                held = [to_local(tensor.detach()) for tensor in tensors]
                print(f"{rank} {name} {sum(t.numel() for t in held) / max(1, sum(t.numel() for t in tensors)):.3f} "
                      f"{torch.cat([t.double().flatten() for t in held]).sum() if held else 0}", flush=True)
            sampled = {weight.device.type for weight in state.ema.sampled.parameters()}
            counters = torch._dynamo.utils.counters
            print(f"{rank} sampled {sampled} graphs {counters['stats']['unique_graphs']} "
                  f"breaks {sum(counters['graph_break'].values())}", flush=True)

        CheckpointManager.finish = finish_and_tell


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
    assert "sampled {'meta'}" in out and "the evaluation failed" not in out
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
    assert "WARNING: (step=0000002) not applied, its gradient is not finite" in out


def test_whose_blocks_travel_in_bf16():
    """Those of linear layers only: of others autocast makes no bfloat16."""
    import models
    assert has_only_linear_weights(models.DiTBlock(16, 2))
    assert not has_only_linear_weights(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
    block = models.DiTBlock(16, 2)
    block.table = torch.nn.Parameter(torch.zeros(6, 16))
    assert not has_only_linear_weights(block)


def test_mistakes(command, tmp_path, monkeypatch):
    status, _, err = command("train", *DIGITS, "--fsdp", "--results-dir", tmp_path / "results")
    assert status == 2 and "--fsdp shares the model between processes, and this is one alone" in err
    assert not (tmp_path / "results").exists()
    status, _, err = command("train", *DIGITS, "--fsdp", "zero", "--results-dir", tmp_path / "results")
    assert status == 2 and "argument --fsdp: invalid choice: 'zero'" in err
    monkeypatch.setattr(distributed, "check_alike", lambda *_: None)
    four = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    for said in ("1", "3", "8", "x", None):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said) if said else monkeypatch.delenv("LOCAL_WORLD_SIZE")
        with pytest.raises(UserError, match=f"--fsdp node .* LOCAL_WORLD_SIZE, .* {said or 'none'} of 4"):
            init_mesh(four, "node")
