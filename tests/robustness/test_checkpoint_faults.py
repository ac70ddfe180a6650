"""Kills, full disks and damage: what is left on the disk is valid, and the next start continues from it."""
import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial

import pytest
import torch

import training.checkpoint_manager
import training.logger
from common.checkpoint_io import latest_valid_checkpoint, load_checkpoint, save_checkpoint
from helpers import DIGITS, DROP, ENDLESS, AtCall, send_signal
from run_files import checkpoint_path, differences, folder_of, scalars, steps_of, stored


def test_twenty_random_kills_lose_at_most_one_interval(children, tmp_path):
    flags = [*DIGITS, *DROP, "--ckpt-every", 5, "--log-every", 1, "--keep-checkpoints", 3]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    generator = random.Random(0)
    for kill in range(20):
        sign = "step=0000006)" if kill == 0 else "Training for"  # when the first checkpoint exists
        out = children.kill_during("train", *flags, *ENDLESS, "--results-dir", killed, "--resume", "auto",
                                   when=lambda out, sign=sign: sign in out, delay=generator.random() * 0.15)
        logged = max(map(int, re.findall(r"\(step=(\d+)\)", out)), default=0)
        warnings = []
        path = latest_valid_checkpoint(str(folder_of(killed)), warnings.append)
        assert warnings == [] and int(re.findall(r"(\d+)\.pt", path)[0]) >= logged - 5
    end = steps_of(killed)[-1] + 5
    children.run("train", *flags, "--max-steps", end, "--results-dir", killed, "--resume", "auto")
    children.run("train", *flags, "--max-steps", end, "--results-dir", undisturbed)
    assert differences(stored(undisturbed, end), stored(killed, end)) == []
    left = sorted(path.name for path in (folder_of(killed) / "checkpoints").iterdir())
    assert left[-1] == f"{end:07d}.pt" and len(left) <= 4 and not any("tmp" in name for name in left)
    straight = scalars(undisturbed)
    assert all(straight[step] == loss for step, loss in scalars(killed).items())


def kill_while_writing(rank):
    """Kill this process in the middle of the bytes of the second checkpoint."""
    save, count = torch.save, [0]

    def save_half(state, file):
        count[0] += 1
        if count[0] == 2:
            file.write(b"half of it")
            file.flush()
            send_signal()
        save(state, file)

    torch.save = save_half


PHASES = {
    "in the middle of its bytes": kill_while_writing,
    "before its bytes are on the disk": AtCall("os.fsync", 3, send_signal),
    "before it has its name": AtCall("os.replace", 2, send_signal),
    "as soon as it has its name": AtCall("os.replace", 2, send_signal, after=True),
    "before the folder is on the disk": AtCall("os.fsync", 4, send_signal),
    "before an old one is removed": AtCall("os.remove", 1, send_signal),
    "after an old one is removed": AtCall("os.remove", 1, send_signal, after=True),
}


def test_folder_of_runs_is_no_run_and_the_latest_is_named(run_error, copied_run):
    err = run_error("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", copied_run)
    assert str(folder_of(copied_run)) in err and "--resume" in err


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["foreground", "background"])
@pytest.mark.parametrize("phase", PHASES)
def test_kill_in_each_phase_of_writing_leaves_a_valid_checkpoint(children, undisturbed, tmp_path, phase, mode):
    flags = [*DIGITS, *DROP, "--ckpt-every", 2, "--keep-checkpoints", 1, *mode, "--max-steps", 6]
    children.run("train", *flags, "--results-dir", tmp_path, prepare=PHASES[phase], status=-signal.SIGKILL)
    warnings = []
    assert latest_valid_checkpoint(str(folder_of(tmp_path)), warnings.append) and warnings == []
    assert steps_of(tmp_path)[-1] in (2, 4)
    children.run("train", *flags, "--results-dir", tmp_path, "--resume", "auto")
    assert differences(stored(undisturbed("digits"), 6), stored(tmp_path, 6)) == []
    assert not list(folder_of(tmp_path).glob("checkpoints/*.tmp"))


def flip_bit(path):
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"/data/0") + 2000] ^= 4
    path.write_bytes(raw)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"truncated": truncate, "a bit flipped": flip_bit, "empty": partial(os.truncate, length=0),
           "missing": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_for_the_previous_one(run_ok, three_checkpoints, copied_run, damage):
    path = checkpoint_path(copied_run, 6)
    DAMAGES[damage](path)
    out = run_ok("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir", copied_run, "--resume", "auto")
    assert "at step 4" in out
    assert (f"WARNING: {path}" in out) == (damage != "missing")
    assert differences(stored(three_checkpoints, 6), stored(copied_run, 6)) == []
    assert len(list(copied_run.iterdir())) == 1


def test_all_ranks_resume_the_same_checkpoint(children, copied_run):
    flip_bit(checkpoint_path(copied_run, 6))
    out = children.run("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", "auto", processes=2)
    assert out.count("at step 4") == 1 and steps_of(copied_run) == [2, 4, 6, 8]


def test_run_with_only_damaged_checkpoints_is_an_error(run_error, copied_run):
    shutil.copytree(folder_of(copied_run), copied_run / "001-DiT-S-2")
    for step, damage in zip((2, 4, 6), DAMAGES):
        DAMAGES[damage](checkpoint_path(copied_run, step, 1))
    for resume in ("auto", copied_run / "001-DiT-S-2"):
        err = run_error("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", resume)
        assert str(copied_run / "001-DiT-S-2") in err and "damaged" in err
    assert len(list(copied_run.iterdir())) == 2


def test_damaged_checkpoint_that_is_named_is_an_error(run_error, copied_run):
    path = checkpoint_path(copied_run, 6)
    flip_bit(path)
    err = run_error("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", path)
    assert f"{path} is damaged" in err


@pytest.mark.parametrize("change", [lambda state: 5, lambda state: state | dict(opt=state["opt"] | dict(state={})),
                                    lambda state: state | dict(opt=[1]), lambda state: state | dict(guard="x")],
                         ids=["a number", "no moments", "moments in a list", "guard is text"])
def test_checkpoint_that_is_not_a_training_state_is_an_error(run_error, copied_run, change):
    path = checkpoint_path(copied_run, 6)
    save_checkpoint(str(path), change(load_checkpoint(str(path))))
    err = run_error("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", path)
    assert f"--resume {path}: " in err
    assert steps_of(copied_run) == [2, 4, 6]


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["foreground", "background"])
def test_retention_keeps_the_latest_milestones_and_the_resumed_checkpoint(run_ok, tmp_path, mode):
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path, *mode]
    run_ok("train", *flags, "--keep-every", 4, "--max-steps", 10)
    assert steps_of(tmp_path) == [4, 8, 9, 10]
    run_ok("train", *flags, "--max-steps", 13, "--resume", "auto")
    assert steps_of(tmp_path) == [10, 12, 13]


def test_retention_does_not_count_later_steps(run_ok, tmp_path):
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path]
    run_ok("train", *flags, "--max-steps", 3)
    for step in (98, 99):
        (folder_of(tmp_path) / "checkpoints" / f"{step:07d}.pt").write_bytes(b"")
    run_ok("train", *flags, "--max-steps", 5, "--resume", "auto")
    assert steps_of(tmp_path) == [3, 4, 5, 98, 99]


def limit_file_size(rank):
    """Limit files of rank 0 to a size above that of a log and below that of a checkpoint."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["foreground", "background"])
@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_ends_all_ranks_and_keeps_the_earlier_checkpoint(children, copied_run, processes, mode):
    """The run would be endless if a rank did not notice."""
    path = checkpoint_path(copied_run, 6)
    before = path.read_bytes()
    out = children.run("train", *DIGITS, "--ckpt-every", 2, *mode, *ENDLESS, "--results-dir", copied_run, "--resume",
                       "auto", processes=processes, prepare=limit_file_size, status=2)
    assert out.count("error:") == 1 and str(checkpoint_path(copied_run, 8)) in out and "Traceback" not in out
    assert sorted(os.listdir(path.parent)) == ["0000002.pt", "0000004.pt", "0000006.pt"]
    assert path.read_bytes() == before


def fill_disk_of_observers(rank):
    """Let log.txt, TensorBoard and pictures fail as on a full disk."""
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    SummaryWriter.add_scalar = SummaryWriter.add_image = training.logger.save_image_grid = fail
    open_file = logging.FileHandler._open

    class FullFile:
        write = flush = staticmethod(fail)

        def __init__(self, file):
            self.close = file.close

    logging.FileHandler._open = lambda handler: FullFile(open_file(handler))


def test_training_continues_if_logs_cannot_be_written(children, tmp_path):
    out = children.run("train", *DIGITS, "--log-every", 1, "--sample-every", 2, "--max-steps", 6, "--results-dir",
                       tmp_path, processes=2, prepare=fill_disk_of_observers)
    assert "without TensorBoard" in out and "(step=0000006)" in out and steps_of(tmp_path) == [6]
    assert "Traceback" not in out and "Logging error" not in out


SLOW_DISK = AtCall("training.checkpoint_manager.save_checkpoint", None, partial(time.sleep, 0.3))


def test_background_saving_writes_the_values_of_its_step(children, undisturbed, tmp_path):
    children.run("train", *DIGITS, *DROP, "--max-steps", 32, "--ckpt-every", 8, "--async-save", "--results-dir",
                 tmp_path, prepare=SLOW_DISK)
    assert steps_of(tmp_path) == [8, 16, 24, 32]
    for step in (8, 16, 24, 32):
        assert differences(stored(undisturbed("digits"), step), stored(tmp_path, step)) == []


def test_symbolic_link_is_replaced_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / f"0000001.pt.{os.getpid()}.tmp").symlink_to(target)
    (tmp_path / "0000001.pt").symlink_to(target)
    save_checkpoint(str(tmp_path / "0000001.pt"), dict(step=1))
    assert target.read_text() == "mine" and not (tmp_path / "0000001.pt").is_symlink()
    assert load_checkpoint(str(tmp_path / "0000001.pt")) == dict(step=1)


def test_sample_set_survives_ten_random_kills(children, three_checkpoints, tmp_path):
    flags = ["--ckpt", checkpoint_path(three_checkpoints, 6), "--num-fid-samples", 160, "--per-proc-batch-size", 4,
             "--num-sampling-steps", 5]
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "straight")
    halt = AtCall("os.replace", 3, partial(time.sleep, 600), after=True)
    generator = random.Random(0)
    def count_parts():
        return len(list((tmp_path / "killed").glob("*/parts/*.npz")))

    for _ in range(10):
        before = count_parts()
        children.kill_during("sample_ddp", *flags, "--sample-dir", tmp_path / "killed", prepare=halt,
                             when=lambda _, before=before: count_parts() > before, delay=generator.random() * 0.05)
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "killed")
    (straight,), (killed,) = (list((tmp_path / name).glob("*.npz")) for name in ("straight", "killed"))
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json", ".npz"]
    assert straight.read_bytes() == killed.read_bytes()
