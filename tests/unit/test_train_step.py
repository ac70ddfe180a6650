"""A step that never waits: what the device decides is what the guard decides, and nothing is read in between."""
import functools
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import models
from autoencoder.vae import IdentityAutoencoder
from common import distributed
from common.files import BackgroundWriter
from common.seeding import BatchRNG
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from helpers import DIGITS, STATE, Spoils, differences, scalars, steps_of, stored
from training.ema import EMA
from training.logger import MetricLogger
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainingStep, Update, clip_grad_norm

RUN = [*DIGITS, "--fused-adamw", "--log-every", 1, "--lr", 1e-3, "--ema-decay", 0.9]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_device_decides_as_the_guard_does(children, tmp_path, processes):
    """Bit for bit, with steps that are not finite among the others; a guard that looks at losses decides itself."""
    for name, extra in (("device", []), ("host", ["--max-loss-spike", 1e9])):
        out = children.run("train", *RUN, *extra, "--max-steps", 6, "--results-dir", tmp_path / name,
                           processes=processes, prepare=Spoils([1, 3], float("nan"), rank=processes - 1))
        for step in (2, 4):
            assert f"WARNING: (step=000000{step}) not applied, its gradient is not finite" in out
        assert "samples whose loss is not finite: " in out
    device, host = (stored(tmp_path / name, 6) for name in ("device", "host"))
    assert [name for name in differences(device, host) if name.startswith(STATE)] == []
    assert device["guard"]["total"] == host["guard"]["total"] == 2
    assert {1, 3, 5, 6} == scalars(tmp_path / "device").keys() and scalars(tmp_path / "device") == scalars(
        tmp_path / "host")


def test_a_checkpoint_between_two_lines_of_the_log(children, tmp_path):
    """All processes hear of the bad step before it, together."""
    out = children.run("train", *DIGITS, "--fused-adamw", "--ckpt-every", 2, "--max-steps", 5, "--results-dir",
                       tmp_path, processes=2, prepare=Spoils([1, 3], float("nan"), rank=1))
    assert len(set(re.findall(r"\(step=(\d+)\) not applied, .*samples whose loss is not finite: \d+", out))) == 2
    assert [stored(tmp_path, step)["guard"]["total"] for step in (2, 4, 5)] == [1, 2, 2]


@pytest.mark.parametrize("before, after", [([], ["--fused-adamw"]), (["--fused-adamw"], [])])
def test_another_optimiser_goes_on(command, tmp_path, monkeypatch, before, after):
    """What the checkpoint's optimiser kept on the host, a fused one wants on the device, and the other way round."""
    command("train", *DIGITS, *before, "--max-steps", 2, "--results-dir", tmp_path)
    seen = []
    load = torch.optim.AdamW.load_state_dict
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda optimizer, state: (
        seen.extend(group["fused"] for group in state["param_groups"]), load(optimizer, state))[1])
    status, _, err = command("train", *DIGITS, *after, "--max-steps", 4, "--resume", "auto", "--results-dir", tmp_path)
    assert status == 0, err
    assert seen == [True if after else None]


def test_too_many_bad_steps_are_noticed_a_step_late(children, tmp_path):
    out = children.run("train", *DIGITS, "--fused-adamw", "--max-bad-steps", 3, "--max-steps", 20, "--results-dir",
                       tmp_path, status=2, prepare=Spoils(range(4, 20), float("nan")))
    assert "4 steps in a row could not be applied (--max-bad-steps)" in out and steps_of(tmp_path) == [8]
    saved = stored(tmp_path, 8)
    assert saved["guard"]["total"] == 4
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())


# What looks at numbers where they lie in host memory, and on a GPU does not: labels, t = 0, data's order, Adam's count.
OF_THE_HOST = {"_check", "_may_hold_zero", "__iter__", "_get_value"}


@pytest.mark.parametrize("flags, readers", [(["--fused-adamw"], set()), ([], {"allows"})])
def test_a_step_reads_nothing(command, tmp_path, monkeypatch, flags, readers):
    """Between two lines of the log no tensor becomes a number, but for the verdict on the step before."""
    reads = [set()]
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, plain=plain: (
            reads[-1].add(sys._getframe(1).f_code.co_name), plain(tensor, *args))[1])
    start = distributed.AsyncHostCopy.__init__
    monkeypatch.setattr(distributed.AsyncHostCopy, "__init__", lambda later, tensor: (setattr(later, "step", len(reads)),
                                                                  start(later, tensor))[1])
    waited = []
    monkeypatch.setattr(distributed.AsyncHostCopy, "read", lambda later: (waited.append(len(reads) - later.step),
                                                      later.value.equal(torch.tensor(True)))[1])
    call = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda *args: (call(*args), reads.append(set())))
    status, _, err = command("train", *DIGITS, *flags, "--max-steps", 8, "--results-dir", tmp_path)
    assert status == 0, err
    assert len(reads) == 9 and set().union(*reads[2:7]) - OF_THE_HOST == readers
    assert waited == ([] if readers else [1] * 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits():
    """torch itself raises an error where something would."""
    device = torch.device("cuda")
    model = models.DiT(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=10).to(device).train()
    diffusion = create_diffusion("")
    step = TrainingStep(model, IdentityAutoencoder(4), diffusion, create_named_schedule_sampler(
        "uniform", diffusion), BatchRNG(0, 8, slice(0, 8), device), parts=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    update = Update(model, optimizer, EMA(model, 0.99), NonFiniteGuard(10), step)
    images, labels = torch.randn(8, 4, 8, 8, device=device), torch.randint(0, 10, (8,), device=device)
    monitor = SimpleNamespace(sums=0, applied=0, _count=lambda: None)
    monitor.add = functools.partial(MetricLogger.add, monitor)
    try:
        for i in range(6):
            torch.cuda.set_sync_debug_mode("error" if i > 2 else "default")
            losses = step.backward(i, images, labels)
            update(i, losses, clip_grad_norm(model, 1.0), lambda step: [list(range(8))], monitor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- work behind the main thread's back

def test_pieces_in_order_one_at_a_time():
    done, running = [], threading.Semaphore(1)

    def piece(i):
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        done.append((i, threading.current_thread() is threading.main_thread()))
        running.release()

    with BackgroundWriter() as behind:
        for i in range(5):
            behind.submit(piece, i)
    assert done == [(i, False) for i in range(5)]


def test_an_error_of_a_piece_is_raised():
    """Where the next is handed over, or at the end; an error of the block itself comes first."""
    def fail():
        raise OSError("disk full")

    done = []
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as behind:
        behind.submit(fail)
        behind.submit(done.append, 1)
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as behind:
        behind.submit(fail)
    with pytest.raises(ValueError, match="of the block"), BackgroundWriter() as behind:
        behind.submit(fail)
        raise ValueError("of the block")
    assert done == []
