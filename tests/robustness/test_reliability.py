"""Every fault that a long run meets, planted in small runs; what must follow is in docs/reliability.md."""
import errno
import logging
import os
import random
import re
import resource
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

import training.checkpoint_manager
import training.logger
from common.checkpoint_io import latest_valid_checkpoint, load_checkpoint, save_checkpoint
from common.errors import EXIT_RESTARTABLE, UserError
from data.image_folder import ImageFolderDataset
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from helpers import (
    DIGITS,
    ROOT,
    STATE,
    TINY,
    AtTrainingLoss,
    SpoilLoss,
    call,
    differences,
    folder_of,
    free_port,
    picture,
    scalars,
    steps_of,
    stored,
    wait_for,
    write_images,
)

DROP = ["--class-dropout-prob", 0.5]
ENDLESS = ["--max-steps", 10**6]


@pytest.fixture(scope="module")
def sources(image_folder, vae_folder, tmp_path_factory):
    """Flags of a run from the digits (179 steps an epoch), from images and from a cache (3 steps an epoch)."""
    cache = tmp_path_factory.mktemp("sources") / "cache"
    images = ["--data-path", image_folder, "--image-size", 32, "--vae", vae_folder]
    call("extract_features", *images, "--features-path", cache, "--num-workers", 0)
    small = [*TINY, "--num-classes", 3, "--global-batch-size", 8, *DROP]
    return dict(digits=[*DIGITS, *DROP], images=[*images, *small], cache=["--features-path", cache, *small])


@pytest.fixture(scope="module")
def undisturbed(module_children, sources, tmp_path_factory):
    """undisturbed(source, processes): the folder of an undisturbed run of 32 steps, with all checkpoints."""
    runs = {}

    def find_run(source, processes=1):
        if (source, processes) not in runs:
            results = tmp_path_factory.mktemp(f"{source}-{processes}")
            module_children.run("train", *sources[source], "--max-steps", 32, "--ckpt-every", 1, "--log-every", 1,
                                "--num-workers", 0, "--results-dir", results, processes=processes)
            runs[source, processes] = results
        return runs[source, processes]

    return find_run


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    """A run of six steps on the digits with checkpoints at 2, 4 and 6."""
    results = tmp_path_factory.mktemp("three")
    call("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir", results)
    return results


@pytest.fixture
def copied_run(three_checkpoints, tmp_path):
    """A copy of `three_checkpoints` to damage or resume."""
    return shutil.copytree(three_checkpoints, tmp_path / "results")


def checkpoint_path(results, step, number=0):
    return folder_of(results, number) / "checkpoints" / f"{step:07d}.pt"


# ---------------------------------------------------------------- exact resumption

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
    """Weights, EMA, optimizer, counters and every loss, bit for bit, in new processes."""
    flags = [*sources[source], *extra, "--log-every", 1, "--max-steps", 7]
    children.run("train", *flags, "--ckpt-every", step, "--results-dir", tmp_path / "straight", processes=processes)
    children.run("train", *flags, "--results-dir", tmp_path / "resumed", "--resume",
                 checkpoint_path(tmp_path / "straight", step), processes=processes)
    assert differences(stored(tmp_path / "straight", 7), stored(tmp_path / "resumed", 7)) == []
    straight, resumed = scalars(tmp_path / "straight"), scalars(tmp_path / "resumed")
    assert len(straight) == 7 and {at: straight[at] for at in range(step + 1, 8)} == resumed


SECOND_MOMENT = [*DIGITS, *DROP, "--schedule-sampler", "loss-second-moment", "--max-loss-spike", 50, "--max-steps", 6]


@pytest.fixture(scope="module")
def second_moment_run(tmp_path_factory):
    """A run that has something in each part of its state, with checkpoints at 3 and 6."""
    results = tmp_path_factory.mktemp("second-moment")
    call("train", *SECOND_MOMENT, "--ckpt-every", 3, "--results-dir", results)
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
def test_control_a_lost_part_of_the_state_changes_the_run(command, second_moment_run, tmp_path, part, lose):
    """The comparison above notices each part that is not restored."""
    state = stored(second_moment_run, 3)
    lose(state)
    save_checkpoint(str(tmp_path / "0000003.pt"), state)
    status, _, err = command("train", *SECOND_MOMENT, "--results-dir", tmp_path / "resumed", "--resume",
                             tmp_path / "0000003.pt")
    assert status == 0, err
    changed = differences(stored(second_moment_run, 6), stored(tmp_path / "resumed", 6))
    visible_in = "/model" if part == "/step" else part  # a step that was taken twice is visible in the weights
    assert any(name.startswith(visible_in) for name in changed) if part else changed == []


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resuming_on_another_number_of_processes_changes_only_rounding(children, sources, undisturbed, tmp_path, before,
                                                                       after):
    """Samples and noise are the same; sums are rounded differently."""
    children.run("train", *sources["cache"], "--num-workers", 0, "--log-every", 1, "--max-steps", 7, "--resume",
                 checkpoint_path(undisturbed("cache", before), 4), "--results-dir", tmp_path, processes=after)
    straight, resumed = scalars(undisturbed("cache", 1)), scalars(tmp_path)
    assert resumed.keys() == {5, 6, 7}
    assert all(abs(straight[step] - resumed[step]) < 1e-5 for step in resumed)


def send_signal(number, with_workers=False):
    """Let another process send a signal to this one, and to the workers that load its data."""
    process = psutil.Process()
    targets = [process, *(process.children() if with_workers else [])]
    subprocess.run(["kill", f"-{int(number)}", *(str(target.pid) for target in targets)], check=True)


@pytest.fixture(scope="module")
def accumulating_run(module_children, tmp_path_factory):
    """A run of seven steps of four microbatches."""
    results = tmp_path_factory.mktemp("accumulating")
    module_children.run("train", *ACCUMULATING, "--results-dir", results)
    return results


ACCUMULATING = [*DIGITS, *DROP, "--grad-accum-steps", 4, "--ckpt-every", 2, "--max-steps", 7]


@pytest.mark.parametrize("number, status, saved", [(signal.SIGTERM, EXIT_RESTARTABLE, 4),
                                                   (signal.SIGKILL, -signal.SIGKILL, 2)])
def test_run_cut_between_microbatches_resumes_exactly(children, accumulating_run, tmp_path, number, status, saved):
    """In the third of four microbatches of step 4: accumulated gradients are applied or lost, never saved."""
    children.run("train", *ACCUMULATING, "--results-dir", tmp_path, status=status,
                 prepare=AtTrainingLoss(3 * 4 + 3, partial(send_signal, number)))
    assert steps_of(tmp_path)[-1] == saved
    children.run("train", *ACCUMULATING, "--results-dir", tmp_path, "--resume", "auto")
    assert differences(stored(accumulating_run, 7), stored(tmp_path, 7)) == []


# ---------------------------------------------------------------- SIGKILL

def test_twenty_random_kills_lose_at_most_one_interval(children, tmp_path):
    """At any moment the latest checkpoint is valid; in the end the run is the undisturbed one."""
    flags = [*DIGITS, *DROP, "--ckpt-every", 5, "--log-every", 1, "--keep-checkpoints", 3]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    generator = random.Random(0)
    for kill in range(20):
        (child,) = children.start("train", *flags, *ENDLESS, "--results-dir", killed, "--resume", "auto")
        sign = "step=0000006)" if kill == 0 else "Training for"  # when the first checkpoint exists
        wait_for(lambda child=child, sign=sign: sign in child.log.read_text() or not child.is_alive())
        time.sleep(generator.random() * 0.15)
        assert child.is_alive(), child.log.read_text()
        child.kill()
        child.join()
        logged = max(map(int, re.findall(r"\(step=(\d+)\)", child.log.read_text())), default=0)
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


class KillAtCall:
    """Kill this process at the n-th call of a function of `os`, before it or after it."""

    def __init__(self, name, call, after=False):
        self.name, self.call, self.after = name, call, after

    def __call__(self, rank):
        function, count = getattr(os, self.name), [0]

        def killing(*args, **kwargs):
            count[0] += 1
            if count[0] == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count[0] == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, self.name, killing)


def kill_while_writing(rank):
    """Kill this process in the middle of the bytes of the second checkpoint."""
    save, count = torch.save, [0]

    def save_half(state, file):
        count[0] += 1
        if count[0] == 2:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = save_half


PHASES = {
    "in the middle of its bytes": kill_while_writing,
    "before its bytes are on the disk": KillAtCall("fsync", 3),
    "before it has its name": KillAtCall("replace", 2),
    "as soon as it has its name": KillAtCall("replace", 2, after=True),
    "before the folder is on the disk": KillAtCall("fsync", 4),
    "before an old one is removed": KillAtCall("remove", 1),
    "after an old one is removed": KillAtCall("remove", 1, after=True),
}


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["foreground", "background"])
@pytest.mark.parametrize("phase", PHASES)
def test_kill_in_each_phase_of_writing_leaves_a_valid_checkpoint(children, undisturbed, tmp_path, phase, mode):
    """The next run resumes it, removes leftovers, and ends as the undisturbed run."""
    flags = [*DIGITS, *DROP, "--ckpt-every", 2, "--keep-checkpoints", 1, *mode, "--max-steps", 6]
    children.run("train", *flags, "--results-dir", tmp_path, prepare=PHASES[phase], status=-signal.SIGKILL)
    warnings = []
    assert latest_valid_checkpoint(str(folder_of(tmp_path)), warnings.append) and warnings == []
    assert steps_of(tmp_path)[-1] in (2, 4)
    children.run("train", *flags, "--results-dir", tmp_path, "--resume", "auto")
    assert differences(stored(undisturbed("digits"), 6), stored(tmp_path, 6)) == []
    assert not list(folder_of(tmp_path).glob("checkpoints/*.tmp"))


# ---------------------------------------------------------------- damaged checkpoints

def flip_bit(path):
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"/data/0") + 2000] ^= 4
    path.write_bytes(raw)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


DAMAGES = {"truncated": truncate, "a bit flipped": flip_bit, "empty": empty, "missing": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_for_the_previous_one(command, three_checkpoints, copied_run, damage):
    """In the same folder, with a warning that names the file."""
    path = checkpoint_path(copied_run, 6)
    DAMAGES[damage](path)
    status, out, err = command("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir", copied_run,
                               "--resume", "auto")
    assert status == 0 and "at step 4" in out, err
    assert (f"WARNING: {path}" in out) == (damage != "missing")
    assert differences(stored(three_checkpoints, 6), stored(copied_run, 6)) == []
    assert len(list(copied_run.iterdir())) == 1


def test_all_ranks_resume_the_same_checkpoint(children, copied_run):
    flip_bit(checkpoint_path(copied_run, 6))
    out = children.run("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", "auto",
                       processes=2)
    assert out.count("at step 4") == 1 and steps_of(copied_run) == [2, 4, 6, 8]


def test_run_with_only_damaged_checkpoints_is_an_error(command, copied_run):
    """It neither starts again, nor resumes an earlier run."""
    shutil.copytree(folder_of(copied_run), copied_run / "001-DiT-S-2")
    for step, damage in zip((2, 4, 6), (truncate, flip_bit, empty)):
        damage(checkpoint_path(copied_run, step, 1))
    for resume in ("auto", copied_run / "001-DiT-S-2"):
        status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", resume)
        assert status == 2 and str(copied_run / "001-DiT-S-2") in err and "damaged" in err
    assert len(list(copied_run.iterdir())) == 2


def test_damaged_checkpoint_that_is_named_is_an_error(command, copied_run):
    path = checkpoint_path(copied_run, 6)
    flip_bit(path)
    status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", path)
    assert status == 2 and f"{path} is damaged" in err


@pytest.mark.parametrize("change", [lambda state: 5, lambda state: state | dict(opt=state["opt"] | dict(state={}))],
                         ids=["a number", "no moments"])
def test_checkpoint_that_is_not_a_training_state_is_an_error(command, copied_run, change):
    """It loads and has valid checksums; test_fuzz.py has more of them."""
    path = checkpoint_path(copied_run, 6)
    save_checkpoint(str(path), change(load_checkpoint(str(path))))
    status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", copied_run, "--resume", path)
    assert status == 2 and f"--resume {path}: " in err and "Traceback" not in err
    assert steps_of(copied_run) == [2, 4, 6]


# ---------------------------------------------------------------- retention

@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["foreground", "background"])
def test_retention_keeps_the_latest_milestones_and_the_resumed_checkpoint(command, tmp_path, mode):
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path, *mode]
    command("train", *flags, "--keep-every", 4, "--max-steps", 10)
    assert steps_of(tmp_path) == [4, 8, 9, 10]
    command("train", *flags, "--max-steps", 13, "--resume", "auto")
    assert steps_of(tmp_path) == [10, 12, 13]


def test_retention_does_not_count_later_steps(command, tmp_path):
    """Damaged checkpoints of later steps do not displace valid ones."""
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path]
    command("train", *flags, "--max-steps", 3)
    for step in (98, 99):
        (folder_of(tmp_path) / "checkpoints" / f"{step:07d}.pt").write_bytes(b"")
    status, _, err = command("train", *flags, "--max-steps", 5, "--resume", "auto")
    assert status == 0 and steps_of(tmp_path) == [3, 4, 5, 98, 99], err


# ---------------------------------------------------------------- disks

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


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("number, processes, workers", [
    (signal.SIGTERM, 1, 0), (signal.SIGUSR1, 1, 2), (signal.SIGTERM, 2, 1), (signal.SIGUSR1, 2, 0)])
def test_signal_stops_all_ranks_with_everything_saved(children, sources, undisturbed, tmp_path, number, processes,
                                                      workers):
    """On the last rank and its workers, in the middle of step 8; the next start continues exactly."""
    flags = [*sources["cache"], "--num-workers", workers, "--results-dir", tmp_path]
    out = children.run("train", *flags, *ENDLESS, processes=processes, status=EXIT_RESTARTABLE,
                       prepare=AtTrainingLoss(8, partial(send_signal, number, with_workers=True), rank=processes - 1))
    (done,) = steps_of(tmp_path)
    assert 8 <= done < 12 and f"after {done} steps; --resume auto continues" in out and "Traceback" not in out
    children.run("train", *flags, "--max-steps", done + 5, "--resume", "auto", processes=processes)
    assert differences(stored(undisturbed("cache", processes), done + 5), stored(tmp_path, done + 5)) == []


def send_sigterm_at_startup(rank):
    """Send the last rank SIGTERM before anything is built or read."""
    import train
    prepare = train.prepare

    def prepare_after_signal(*args):
        if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*args)

    train.prepare = prepare_after_signal


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_during_startup_is_not_lost(children, tmp_path, processes):
    """The run saves after its first steps."""
    children.run("train", *DIGITS, *ENDLESS, "--results-dir", tmp_path, processes=processes,
                 prepare=send_sigterm_at_startup, status=EXIT_RESTARTABLE)
    assert steps_of(tmp_path) == [processes]


# ---------------------------------------------------------------- faults of the data

def truncate_image(path):
    path.write_bytes(path.read_bytes()[:50])


def kill_worker():
    psutil.Process().children()[0].kill()


@pytest.mark.parametrize("fault, processes, workers", [
    ("image", 1, 0), ("image", 1, 2), ("image", 2, 0), ("image", 2, 1), ("worker", 1, 2), ("worker", 2, 1)])
def test_data_fault_stops_all_ranks_with_everything_saved(children, image_folder, sources, undisturbed, tmp_path, fault,
                                                          processes, workers):
    """On the last rank, in the middle of step 5: an error and status 2; once repaired, the run continues exactly."""
    shutil.copytree(image_folder, tmp_path / "images")
    image = tmp_path / "images" / "bee" / "3.png"
    flags = [*sources["images"], "--data-path", tmp_path / "images", "--num-workers", workers, "--results-dir",
             tmp_path / "cut"]
    action, cause = dict(image=(partial(truncate_image, image), str(image)),
                         worker=(kill_worker, "a process that loads data died"))[fault]
    out = children.run("train", *flags, *ENDLESS, processes=processes, status=2,
                       prepare=AtTrainingLoss(5, action, rank=processes - 1))
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


# ---------------------------------------------------------------- other processes

def hang_at_startup(rank):
    if rank == 1:
        import train
        train.prepare = lambda *args: time.sleep(600)


def stop_process():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("fault, work", [(hang_at_startup, "the start"),
                                         (AtTrainingLoss(5, stop_process, rank=1), "training step 5")])
def test_rank_that_hangs_is_reported_by_the_others(children, tmp_path, fault, work):
    """After --dist-timeout, with the work that they waited for."""
    group = children.start("train", *DIGITS, *ENDLESS, "--dist-timeout", 0.2, "--results-dir", tmp_path, processes=2,
                           prepare=fault)
    out = children.join(group[:1], status=2)
    assert f"error: {work}: " in out and "0.2 minutes" in out and "Traceback" not in out, out


RESTARTED = """
import os, signal, sys
sys.path[:0] = {paths}
import train
from common.errors import run_command
from helpers import AtTrainingLoss
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    AtTrainingLoss(11, lambda: os.kill(os.getpid(), signal.SIGKILL))(1)
run_command(train.main)
"""


def test_torchrun_restarts_a_run_exactly(sources, undisturbed, tmp_path):
    """Rank 1 dies in step 11, all ranks start again, and the run ends as the undisturbed one."""
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


# ---------------------------------------------------------------- non-finite steps and loss spikes

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


# ---------------------------------------------------------------- saving in the background

def slow_down_disk(rank):
    save = training.checkpoint_manager.save_checkpoint

    def save_slowly(path, state):
        time.sleep(0.3)
        save(path, state)

    training.checkpoint_manager.save_checkpoint = save_slowly


def test_background_saving_writes_the_values_of_its_step(children, undisturbed, tmp_path):
    """While training continues; the end waits for the last checkpoint."""
    children.run("train", *DIGITS, *DROP, "--max-steps", 32, "--ckpt-every", 8, "--async-save", "--results-dir",
                 tmp_path, prepare=slow_down_disk)
    assert steps_of(tmp_path) == [8, 16, 24, 32]
    for step in (8, 16, 24, 32):
        assert differences(stored(undisturbed("digits"), step), stored(tmp_path, step)) == []


# ---------------------------------------------------------------- hostile files

def test_symbolic_link_is_replaced_not_followed(tmp_path):
    """In the place of a checkpoint, and of its temporary file."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / f"0000001.pt.{os.getpid()}.tmp").symlink_to(target)
    (tmp_path / "0000001.pt").symlink_to(target)
    save_checkpoint(str(tmp_path / "0000001.pt"), dict(step=1))
    assert target.read_text() == "mine" and not (tmp_path / "0000001.pt").is_symlink()
    assert load_checkpoint(str(tmp_path / "0000001.pt")) == dict(step=1)


# ---------------------------------------------------------------- changed flags and data

def test_changed_flags_need_confirmation(command, copied_run):
    """Each change is named with both values; flags that do not change the run are free."""
    resume = [*DIGITS, "--max-steps", 7, "--results-dir", copied_run, "--resume", "auto"]
    changed = ["--lr", 0.5, "--global-batch-size", 16, "--ema-decay", 0.5]
    status, _, err = command("train", *resume, *changed)
    for change in ("--lr is 0.5, it was 0.0001", "--global-batch-size is 16, it was 8",
                   "--ema-decay is 0.5, it was 0.9999", "--allow-config-change"):
        assert status == 2 and change in err
    assert steps_of(copied_run) == [2, 4, 6]
    status, out, _ = command("train", *resume, *changed, "--allow-config-change")
    assert status == 0 and out.count("(--allow-config-change)") == 3
    assert stored(copied_run, 7)["opt"]["param_groups"][0]["lr"] == 0.5
    status, _, err = command("train", *resume, "--depth", 2, "--allow-config-change")
    assert status == 2 and "depth=2" in err
    status, out, _ = command("train", *resume, *changed, "--max-steps", 8, "--log-every", 1, "--num-workers", 1,
                             "--keep-checkpoints", 9, "--async-save", "--grad-accum-steps", 2)
    assert status == 0 and "WARNING" not in out


def test_changed_data_need_confirmation(command, image_folder, tmp_path):
    """Another place is free; another number of images is not."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    flags = ["--image-size", 32, "--vae", "none", "--num-classes", 3, *TINY, "--global-batch-size", 8, "--num-workers",
             0, "--results-dir", tmp_path / "results", "--model", "DiT-S/8"]
    command("train", "--data-path", image_folder, *flags, "--max-steps", 1)
    status, _, err = command("train", "--data-path", images, *flags, "--max-steps", 2, "--resume", "auto")
    assert status == 0, err
    (images / "bee" / "3.png").unlink()
    status, _, err = command("train", "--data-path", images, *flags, "--max-steps", 3, "--resume", "auto")
    assert status == 2 and "num images 23" in err and "24" in err


def test_observation_does_not_change_the_run(command, sources, undisturbed, tmp_path):
    """Logs, pictures and checkpoints, often or never: the same run bit for bit."""
    flags = [*sources["cache"], "--num-workers", 0, "--max-steps", 9]
    for name, extra in (("rarely", ["--log-every", 0]), ("often", ["--log-every", 1, "--sample-every", 4,
                                                                   "--ckpt-every", 2, "--async-save"])):
        status, _, err = command("train", *flags, *extra, "--results-dir", tmp_path / name)
        assert status == 0, err
        assert differences(stored(undisturbed("cache"), 9), stored(tmp_path / name, 9)) == []
    assert len(list(folder_of(tmp_path / "often").glob("samples/*.png"))) == 2


# ---------------------------------------------------------------- sample sets

class HaltAfter:
    """Let this process wait for its end once it has written some files."""

    def __init__(self, count):
        self.count = count

    def __call__(self, rank):
        replace, count = os.replace, [0]

        def halting(*args, **kwargs):
            replace(*args, **kwargs)
            count[0] += 1
            if count[0] == self.count:
                time.sleep(600)

        os.replace = halting


def test_sample_set_survives_ten_random_kills(children, three_checkpoints, tmp_path):
    """The .npz is that of an undisturbed run, byte for byte."""
    flags = ["--ckpt", checkpoint_path(three_checkpoints, 6), "--num-fid-samples", 160, "--per-proc-batch-size", 4,
             "--num-sampling-steps", 5]
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "straight")
    generator = random.Random(0)
    for _ in range(10):
        (child,) = children.start("sample_ddp", *flags, "--sample-dir", tmp_path / "killed", prepare=HaltAfter(3))
        before = len(list((tmp_path / "killed").glob("*/parts/*.npz")))
        wait_for(lambda before=before: len(list((tmp_path / "killed").glob("*/parts/*.npz"))) > before)
        time.sleep(generator.random() * 0.05)
        assert child.is_alive(), child.log.read_text()
        child.kill()
        child.join()
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "killed")
    (straight,), (killed,) = (list((tmp_path / name).glob("*.npz")) for name in ("straight", "killed"))
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json", ".npz"]
    assert straight.read_bytes() == killed.read_bytes()
