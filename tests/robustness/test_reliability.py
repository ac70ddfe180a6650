"""Every other fault of a long run, planted in small runs; what must follow is in docs/reliability.md."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from PIL import Image

from common.checkpoint_io import save_checkpoint
from common.errors import EXIT_RESTARTABLE, UserError
from data.image_folder import ImageFolderDataset
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from helpers import DIGITS, DROP, ENDLESS, ROOT, TINY, AtCall, AtLoss, SpoilLoss, free_port, send_signal, wait_for
from run_files import STATE, checkpoint_path, differences, folder_of, picture, scalars, steps_of, stored, write_images

CASES = {
    "digits, in mid-epoch": ("digits", 3, 1, ["--schedule-sampler", "loss-second-moment", "--max-grad-norm", 0.5]),
    "digits, accumulating": ("digits", 4, 1, ["--grad-accum-steps", 4, "--max-loss-spike", 50]),
    "images, at the end of an epoch, two workers": ("images", 3, 1, ["--num-workers", 2, "--grad-accum-steps", 2]),
    "images, in mid-epoch, one worker, two processes": ("images", 4, 2, ["--num-workers", 1]),
    "cache, in mid-epoch, one worker": ("cache", 4, 1, ["--num-workers", 1]),
    "cache, at the end of an epoch, two processes": ("cache", 3, 2, ["--num-workers", 0]),
}


@pytest.mark.parametrize("source, step, processes, extra", CASES.values(), ids=CASES)
def test_resumed_run_equals_the_undisturbed_run(children, sources, tmp_path, source, step, processes, extra):
    flags = [*sources[source], *extra, "--log-every", 1, "--max-steps", 7]
    children.run("train", *flags, "--ckpt-every", step, "--results-dir", tmp_path / "straight", processes=processes)
    children.run("train", *flags, "--results-dir", tmp_path / "resumed", "--resume",
                 checkpoint_path(tmp_path / "straight", step), processes=processes)
    assert differences(stored(tmp_path / "straight", 7), stored(tmp_path / "resumed", 7)) == []
    straight, resumed = scalars(tmp_path / "straight"), scalars(tmp_path / "resumed")
    assert len(straight) == 7 and {at: straight[at] for at in range(step + 1, 8)} == resumed


SECOND_MOMENT = [*DIGITS, *DROP, "--schedule-sampler", "loss-second-moment", "--max-loss-spike", 50, "--max-steps", 6]


@pytest.fixture(scope="module")
def second_moment_run(session_children, tmp_path_factory):
    """A run that has something in each part of its state, with checkpoints at 3 and 6."""
    results = tmp_path_factory.mktemp("second-moment")
    session_children.run("train", *SECOND_MOMENT, "--ckpt-every", 3, "--results-dir", results)
    return results


def reset_moments(state):
    for moments in state["opt"]["state"].values():
        moments.update({name: torch.zeros_like(moment) for name, moment in moments.items()})


def zero(name, state):
    state[name] = {key: torch.zeros_like(value) for key, value in state[name].items()}


@pytest.mark.parametrize("part, lose", [
    ("/model", partial(zero, "model")), ("/ema", partial(zero, "ema")), ("/opt", reset_moments),
    ("/step", lambda state: state.update(step=2)), ("", lambda state: None),
    ("/schedule_sampler", partial(zero, "schedule_sampler")), ("/guard", lambda state: state.pop("guard")),
], ids=["model", "ema", "opt", "step", "nothing", "schedule_sampler", "guard"])
def test_control_a_lost_part_of_the_state_changes_the_run(run_ok, second_moment_run, tmp_path, part, lose):
    """The comparison above notices each part that is not restored."""
    state = stored(second_moment_run, 3)
    lose(state)
    save_checkpoint(str(tmp_path / "0000003.pt"), state)
    run_ok("train", *SECOND_MOMENT, "--results-dir", tmp_path / "resumed", "--resume", tmp_path / "0000003.pt")
    changed = differences(stored(second_moment_run, 6), stored(tmp_path / "resumed", 6))
    visible_in = "/model" if part == "/step" else part  # a step that was taken twice is visible in the weights
    assert any(name.startswith(visible_in) for name in changed) if part else changed == []


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_processes_changes_only_rounding(children, sources, undisturbed, tmp_path, before, after):
    """Samples and noise are the same; sums are rounded differently."""
    children.run("train", *sources["cache"], "--num-workers", 0, "--log-every", 1, "--max-steps", 7, "--resume",
                 checkpoint_path(undisturbed("cache", before), 4), "--results-dir", tmp_path, processes=after)
    straight, resumed = scalars(undisturbed("cache", 1)), scalars(tmp_path)
    assert resumed.keys() == {5, 6, 7}
    assert all(abs(straight[step] - resumed[step]) < 1e-5 for step in resumed)


@pytest.fixture(scope="module")
def accumulating_run(session_children, tmp_path_factory):
    results = tmp_path_factory.mktemp("accumulating")
    session_children.run("train", *ACCUMULATING, "--results-dir", results)
    return results


ACCUMULATING = [*DIGITS, *DROP, "--grad-accum-steps", 4, "--ckpt-every", 2, "--max-steps", 7]


@pytest.mark.parametrize("number, status, saved", [(signal.SIGTERM, EXIT_RESTARTABLE, 4),
                                                   (signal.SIGKILL, -signal.SIGKILL, 2)])
def test_run_cut_between_microbatches_resumes_exactly(children, accumulating_run, tmp_path, number, status, saved):
    """In the third of four microbatches of step 4: accumulated gradients are applied or lost, never saved."""
    children.run("train", *ACCUMULATING, "--results-dir", tmp_path, status=status,
                 prepare=AtLoss(3 * 4 + 3, partial(send_signal, number)))
    assert steps_of(tmp_path)[-1] == saved
    children.run("train", *ACCUMULATING, "--results-dir", tmp_path, "--resume", "auto")
    assert differences(stored(accumulating_run, 7), stored(tmp_path, 7)) == []


def test_changed_flags_need_confirmation(command, run_ok, run_error, copied_run):
    resume = [*DIGITS, "--max-steps", 7, "--results-dir", copied_run, "--resume", "auto"]
    changed = ["--lr", 0.5, "--global-batch-size", 16, "--ema-decay", 0.5]
    status, _, err = command("train", *resume, *changed)
    for change in ("--lr is 0.5, it was 0.0001", "--global-batch-size is 16, it was 8",
                   "--ema-decay is 0.5, it was 0.9999", "--allow-config-change"):
        assert status == 2 and change in err
    assert steps_of(copied_run) == [2, 4, 6]
    assert run_ok("train", *resume, *changed, "--allow-config-change").count("(--allow-config-change)") == 3
    assert stored(copied_run, 7)["opt"]["param_groups"][0]["lr"] == 0.5
    assert "depth=2" in run_error("train", *resume, "--depth", 2, "--allow-config-change")
    out = run_ok("train", *resume, *changed, "--max-steps", 8, "--log-every", 1, "--num-workers", 1,
                 "--keep-checkpoints", 9, "--async-save", "--grad-accum-steps", 2)
    assert "WARNING" not in out


def test_changed_data_need_confirmation(run_ok, run_error, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    flags = ["--image-size", 32, "--vae", "none", "--num-classes", 3, *TINY, "--global-batch-size", 8, "--num-workers",
             0, "--results-dir", tmp_path / "results", "--model", "DiT-S/8"]
    run_ok("train", "--data-path", image_folder, *flags, "--max-steps", 1)
    run_ok("train", "--data-path", images, *flags, "--max-steps", 2, "--resume", "auto")
    (images / "bee" / "3.png").unlink()
    err = run_error("train", "--data-path", images, *flags, "--max-steps", 3, "--resume", "auto")
    assert "num images 23" in err and "24" in err


def test_observation_does_not_change_the_run(run_ok, sources, undisturbed, tmp_path):
    flags = [*sources["cache"], "--num-workers", 0, "--max-steps", 9]
    for name, extra in (("rarely", ["--log-every", 0]), ("often", ["--log-every", 1, "--sample-every", 4,
                                                                   "--ckpt-every", 2, "--async-save"])):
        run_ok("train", *flags, *extra, "--results-dir", tmp_path / name)
        assert differences(stored(undisturbed("cache"), 9), stored(tmp_path / name, 9)) == []
    assert len(list(folder_of(tmp_path / "often").glob("samples/*.png"))) == 2


def signal_with_workers(number):
    """Let another process send a signal to this one, and to the workers that load its data."""
    process = psutil.Process()
    targets = [process, *process.children()]
    subprocess.run(["kill", f"-{int(number)}", *(str(target.pid) for target in targets)], check=True)


@pytest.mark.parametrize("number, processes, workers", [
    (signal.SIGTERM, 1, 0), (signal.SIGUSR1, 1, 2), (signal.SIGTERM, 2, 1), (signal.SIGUSR1, 2, 0)])
def test_signal_stops_all_ranks_and_saves(children, sources, undisturbed, tmp_path, number, processes, workers):
    """On the last rank and its workers, in the middle of step 8; the next start continues exactly."""
    flags = [*sources["cache"], "--num-workers", workers, "--results-dir", tmp_path]
    out = children.run("train", *flags, *ENDLESS, processes=processes, status=EXIT_RESTARTABLE,
                       prepare=AtLoss(8, partial(signal_with_workers, number), rank=processes - 1))
    (done,) = steps_of(tmp_path)
    assert 8 <= done < 12 and f"after {done} steps; --resume auto continues" in out and "Traceback" not in out
    children.run("train", *flags, "--max-steps", done + 5, "--resume", "auto", processes=processes)
    assert differences(stored(undisturbed("cache", processes), done + 5), stored(tmp_path, done + 5)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_during_startup_is_not_lost(children, tmp_path, processes):
    children.run("train", *DIGITS, *ENDLESS, "--results-dir", tmp_path, processes=processes,
                 prepare=AtCall("train.prepare", 1, partial(send_signal, signal.SIGTERM), rank=processes - 1),
                 status=EXIT_RESTARTABLE)
    assert steps_of(tmp_path) == [processes]


def kill_worker():
    psutil.Process().children()[0].kill()


@pytest.mark.parametrize("fault, processes, workers", [
    ("image", 1, 0), ("image", 1, 2), ("image", 2, 0), ("image", 2, 1), ("worker", 1, 2), ("worker", 2, 1)])
def test_data_fault_stops_all_ranks_and_saves(children, image_folder, sources, undisturbed, tmp_path, fault, processes,
                                              workers):
    """On the last rank, in the middle of step 5: an error and status 2; once repaired, the run continues exactly."""
    shutil.copytree(image_folder, tmp_path / "images")
    image = tmp_path / "images" / "bee" / "3.png"
    flags = [*sources["images"], "--data-path", tmp_path / "images", "--num-workers", workers, "--results-dir",
             tmp_path / "cut"]
    action, cause = dict(image=(partial(os.truncate, image, 50), str(image)),
                         worker=(kill_worker, "a process that loads data died"))[fault]
    out = children.run("train", *flags, *ENDLESS, processes=processes, status=2,
                       prepare=AtLoss(5, action, rank=processes - 1))
    assert out.count("error: ") == 1 and cause in out and "Traceback" not in out, out
    (done,) = steps_of(tmp_path / "cut")
    shutil.copy(image_folder / "bee" / "3.png", image)
    children.run("train", *flags, "--max-steps", done + 4, "--resume", "auto", processes=processes)
    assert differences(stored(undisturbed("images", processes), done + 4), stored(tmp_path / "cut", done + 4)) == []


def test_death_of_a_worker_is_raised_where_a_batch_is_waited_for(tmp_path):
    """Not at any other line, such as in the middle of an optimizer step."""
    files = {f"a/{i}.png": Image.fromarray(picture(8, 8, 3, seed=i)) for i in range(8)}
    dataset = ImageFolderDataset(write_images(tmp_path, files), 8)
    batches = StepBatchSampler(8, 2, slice(0, 2), 0, 0, 5000, flips=False)
    others = psutil.Process().children()
    loader = PrefetchLoader(dataset, batches, 1, torch.device("cpu"), pytest.fail)
    iterator = iter(loader)
    next(iterator)
    (worker,) = [child for child in psutil.Process().children() if child not in others]
    worker.kill()
    wait_for(lambda: worker.status() == psutil.STATUS_ZOMBIE)
    time.sleep(0.1)  # time in which the signal could be handled here
    assert loader.fault is None
    with pytest.raises(UserError, match="a process that loads data died"):
        list(iterator)


@pytest.mark.parametrize("fault, work", [
    (AtCall("train.prepare", 1, partial(time.sleep, 600), rank=1), "the start"),
    (AtLoss(5, partial(send_signal, signal.SIGSTOP), rank=1), "training step 5")])
def test_rank_that_hangs_is_reported_by_the_others(children, tmp_path, fault, work):
    group = children.start("train", *DIGITS, *ENDLESS, "--dist-timeout", 0.4, "--results-dir", tmp_path, processes=2,
                           prepare=fault)
    out = children.join(group[:1], status=2)
    assert f"error: {work}: " in out and "0.4 minutes" in out and "Traceback" not in out, out


RESTARTED = """
import os, sys
sys.path[:0] = {paths}
import train
from common.errors import run_command
from helpers import AtLoss, send_signal
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    AtLoss(11, send_signal)(1)
run_command(train.main)
"""


def test_torchrun_restarts_a_run_exactly(sources, undisturbed, tmp_path):
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(paths=[str(ROOT), str(ROOT / "tests")]))
    flags = [*sources["cache"], "--max-steps", 20, "--num-workers", 0, "--ckpt-every", 4, "--resume", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", script, *flags, "--results-dir",
               tmp_path / "results"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600,
                          env=dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    assert done.returncode == 0, done.stderr
    log = (folder_of(tmp_path / "results") / "log.txt").read_text()
    assert log.count("Resuming from") == 1 and log.count("Done!") == 1
    assert differences(stored(undisturbed("cache", 2), 20), stored(tmp_path / "results", 20)) == []


@pytest.mark.parametrize("value, processes", [(float("nan"), 1), (float("inf"), 2)])
def test_non_finite_step_changes_no_state(children, tmp_path, value, processes):
    """Of one rank: on all, weights, EMA, optimizer and timestep sampler stay; the step counts, its sample is named."""
    flags = [*DIGITS, "--ckpt-every", 1, "--log-every", 1, "--max-steps", 5, "--results-dir", tmp_path,
             "--schedule-sampler", "loss-second-moment"]
    out = children.run("train", *flags, processes=processes, prepare=SpoilLoss([2], value, rank=processes - 1))
    states = {step: stored(tmp_path, step) for step in range(1, 6)}
    assert [name for name in differences(states[2], states[3]) if name.startswith(STATE)] == []
    for step in (1, 3, 4):
        changed = differences(states[step], states[step + 1])
        assert all(any(name.startswith(part) for name in changed) for part in STATE)
    assert states[5]["guard"]["total"] == 1 and states[5]["step"] == 5
    items = StepBatchSampler(1438, 8, slice(0, 8 // processes), 0, 0, 5, flips=False).items(2)
    (line,) = set(re.findall(r"WARNING: (\(step=0000003\) .*)", out))
    assert f"samples whose loss is non-finite: {items[processes - 1][1]}" in line
    assert 3 not in scalars(tmp_path)


def test_too_many_bad_steps_end_the_run(children, tmp_path):
    """In a row: a good step restarts the count. The last good state is saved, and can be resumed."""
    flags = [*DIGITS, "--max-bad-steps", 3, "--results-dir", tmp_path]
    out = children.run("train", *flags, "--max-steps", 20, processes=2, status=2,
                       prepare=SpoilLoss([1, 2, 4, 5, 6, 7, 8], float("nan"), rank=1))
    assert "--max-bad-steps 3:" in out and str(checkpoint_path(tmp_path, 7)) in out and steps_of(tmp_path) == [7]
    saved = stored(tmp_path, 7)
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())
    assert saved["guard"]["total"] == 5
    children.run("train", *flags, "--max-steps", 9, "--resume", "auto", processes=2)
    assert steps_of(tmp_path) == [7, 9]


def test_loss_spike_is_not_applied(children, tmp_path):
    """A spike is relative to the average of the last 100 losses over all ranks; before that, none counts."""
    flags = [*DIGITS, "--log-every", 1]
    out = children.run("train", *flags, "--max-steps", 106, "--max-loss-spike", 5, "--results-dir", tmp_path / "on",
                       processes=2, prepare=SpoilLoss([50, 104], 200.0, rank=1))
    bad = set(re.findall(r"WARNING: \(step=(\d+)\) not applied, its loss", out))
    assert bad == {"0000105"} and scalars(tmp_path / "on")[51] > 5
    out = children.run("train", *flags, "--max-steps", 5, "--results-dir", tmp_path / "off", processes=2,
                       prepare=SpoilLoss([3], 200.0, rank=1))
    assert "not applied" not in out and scalars(tmp_path / "off")[4] > 5
