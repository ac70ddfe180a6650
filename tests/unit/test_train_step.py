"""The training step: it reads nothing from the device, and the device decides as the guard does."""
import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from autoencoder.vae import IdentityAutoencoder
from common.seeding import BatchRNG
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from helpers import DIGITS, SpoilLoss
from run_files import STATE, differences, scalars, steps_of, stored
from training.ema import EMA
from training.logger import MetricLogger
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainStep

RUN = [*DIGITS, "--fused-adamw", "--log-every", 1, "--lr", 1e-3, "--ema-decay", 0.9]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_device_decides_as_the_guard_does(children, tmp_path, processes):
    """Bit for bit, with two non-finite steps; a guard with a spike limit decides on the host."""
    for name, extra in (("device", []), ("host", ["--max-loss-spike", 1e9])):
        out = children.run("train", *RUN, *extra, "--max-steps", 6, "--results-dir", tmp_path / name,
                           processes=processes, prepare=SpoilLoss([1, 3], float("nan"), rank=processes - 1))
        for step in (2, 4):
            assert f"WARNING: (step=000000{step}) not applied, its gradient is non-finite" in out
        assert "samples whose loss is non-finite: " in out
    device, host = (stored(tmp_path / name, 6) for name in ("device", "host"))
    assert [name for name in differences(device, host) if name.startswith(STATE)] == []
    assert device["guard"]["total"] == host["guard"]["total"] == 2
    assert {1, 3, 5, 6} == scalars(tmp_path / "device").keys() and scalars(tmp_path / "device") == scalars(
        tmp_path / "host")


def test_checkpoint_counts_bad_steps_before_it(children, tmp_path):
    out = children.run("train", *DIGITS, "--fused-adamw", "--ckpt-every", 2, "--max-steps", 5, "--results-dir",
                       tmp_path, processes=2, prepare=SpoilLoss([1, 3], float("nan"), rank=1))
    assert len(set(re.findall(r"\(step=(\d+)\) not applied, .*samples whose loss is non-finite: \d+", out))) == 2
    assert [stored(tmp_path, step)["guard"]["total"] for step in (2, 4, 5)] == [1, 2, 2]


@pytest.mark.parametrize("before, after", [([], ["--fused-adamw"]), (["--fused-adamw"], [])])
def test_fused_optimizer_resumes_another_and_vice_versa(run_ok, tmp_path, monkeypatch, before, after):
    """The flags decide whether it is fused, and with it on which device its step counts are."""
    run_ok("train", *DIGITS, *before, "--max-steps", 2, "--results-dir", tmp_path)
    seen = []
    load = torch.optim.AdamW.load_state_dict
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda optimizer, state: (
        seen.extend(group["fused"] for group in state["param_groups"]), load(optimizer, state))[1])
    run_ok("train", *DIGITS, *after, "--max-steps", 4, "--resume", "auto", "--results-dir", tmp_path)
    assert seen == [True if after else None]


def test_too_many_bad_steps_end_the_run_one_step_late(children, tmp_path):
    out = children.run("train", *DIGITS, "--fused-adamw", "--max-bad-steps", 3, "--max-steps", 20, "--results-dir",
                       tmp_path, status=2, prepare=SpoilLoss(range(4, 20), float("nan")))
    assert "4 steps in a row" in out and "--max-bad-steps" in out and steps_of(tmp_path) == [8]
    saved = stored(tmp_path, 8)
    assert saved["guard"]["total"] == 4
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())


def random_step(device, **options):
    """Return a TrainStep with a fused AdamW on a new model; `options` are those of TrainStep."""
    model = models.DiT(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=10).to(device).train()
    diffusion = create_diffusion("")
    schedule_sampler = create_named_schedule_sampler("uniform", diffusion)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    guard = NonFiniteGuard(10, sample_indices=lambda step: [list(range(8))])
    return TrainStep(model, model, IdentityAutoencoder(4), diffusion, schedule_sampler, optimizer, [EMA(model, 0.99)],
                     guard, BatchRNG(0, 8, slice(0, 8), torch.device(device)), **options)


class HostReads(TorchDispatchMode):
    """Count how often a floating-point value becomes a Python number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_loss_spike, reads", [(None, 0), (5.0, 2)])
def test_a_step_reads_nothing_from_the_device(max_loss_spike, reads):
    """The decision on a step is read one step later; a spike limit needs the norm and the loss at once."""
    train_step = random_step("cpu")
    train_step.guard.max_loss_spike = max_loss_spike
    train_step.__post_init__()
    images, cond = torch.randn(8, 4, 8, 8), dict(y=torch.randint(0, 10, (8,)))
    for step in range(3):
        pending = train_step.guard.pending
        with HostReads() as host_reads:
            losses, grad_norm, is_applied = train_step(step, images, cond)
        assert host_reads.count == reads
        assert torch.is_tensor(is_applied) == (reads == 0) and torch.isfinite(grad_norm)
        assert train_step.guard.pending is not pending or reads
    train_step.guard.settle()
    assert train_step.guard.total == 0 and all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits():
    """torch raises an error at a host sync."""
    train_step = random_step("cuda", max_grad_norm=1.0)
    metrics = SimpleNamespace(sums=0, applied=0, steps=0, bar=SimpleNamespace(update=lambda: None))
    images, cond = torch.randn(8, 4, 8, 8, device="cuda"), dict(y=torch.randint(0, 10, (8,), device="cuda"))
    try:
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            losses, _, is_applied = train_step(step, images, cond)
            MetricLogger.update(metrics, losses, is_applied)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_non_finite_gradient_changes_nothing_on_the_device():
    train_step = random_step("cpu")
    images, cond = torch.randn(8, 4, 8, 8), dict(y=torch.randint(0, 10, (8,)))
    train_step(0, images, cond)
    before = copy.deepcopy([train_step.model.state_dict(), train_step.optimizer.state_dict()["state"],
                            train_step.emas[0].model.state_dict()])
    _, _, is_applied = train_step(1, torch.full_like(images, float("nan")), cond)
    after = [train_step.model.state_dict(), train_step.optimizer.state_dict()["state"],
             train_step.emas[0].model.state_dict()]
    assert not is_applied and differences(before, after) == []
    _, _, is_applied = train_step(2, images, cond)
    assert is_applied and differences(before, after) != []
    train_step.guard.settle()
    assert (train_step.guard.total, train_step.guard.in_a_row) == (1, 0)
