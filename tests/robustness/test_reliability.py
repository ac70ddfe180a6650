"""Every fault that a long run meets, injected; what must come of it is in docs/reliability.md."""
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
from diffusion.gaussian_diffusion import GaussianDiffusion
from helpers import (
    DIGITS,
    ROOT,
    STATE,
    TINY,
    Spoils,
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


# ---------------------------------------------------------------- 1, 2: exact resume

@pytest.fixture(scope="module")
def sources(image_folder, vae_folder, tmp_path_factory):
    """Flags of a run from the digits (179 steps an epoch), from images and from a cache (3 steps an epoch)."""
    cache = tmp_path_factory.mktemp("sources") / "cache"
    images = ["--data-path", image_folder, "--image-size", 32, "--vae", vae_folder]
    call("extract_features", *images, "--features-path", cache, "--num-workers", 0)
    small = [*TINY, "--num-classes", 3, "--global-batch-size", 8, *DROP]
    return dict(digits=[*DIGITS, *DROP], images=[*images, *small], cache=["--features-path", cache, *small])


CASES = {
    "digits, in mid-epoch": ("digits", 3, 1, ["--schedule-sampler", "loss-second-moment", "--max-grad-norm", 0.5]),
    "digits, accumulating": ("digits", 4, 1, ["--grad-accum-steps", 4, "--max-loss-spike", 50]),
    "images, at the end of an epoch, two workers": ("images", 3, 1, ["--num-workers", 2, "--grad-accum-steps", 2]),
    "images, in mid-epoch, one worker, two processes": ("images", 4, 2, ["--num-workers", 1]),
    "cache, in mid-epoch, one worker": ("cache", 4, 1, ["--num-workers", 1]),
    "cache, at the end of an epoch, two processes": ("cache", 3, 2, ["--num-workers", 0]),
}


@pytest.mark.parametrize("source, cut, processes, extra", CASES.values(), ids=CASES)
def test_cut_and_resumed_is_undisturbed(children, sources, tmp_path, source, cut, processes, extra):
    """Weights, EMA, optimiser, counters and every loss, bit for bit, in new processes."""
    flags = [*sources[source], *extra, "--log-every", 1]
    children.run("train", *flags, "--max-steps", 7, "--results-dir", tmp_path / "straight", processes=processes)
    children.run("train", *flags, "--max-steps", cut, "--results-dir", tmp_path / "cut", processes=processes)
    out = children.run("train", *flags, "--max-steps", 7, "--results-dir", tmp_path / "cut", "--resume", "auto",
                       processes=processes)
    assert f"at step {cut}" in out
    assert differences(stored(tmp_path / "straight", 7), stored(tmp_path / "cut", 7)) == []
    straight = scalars(tmp_path / "straight")
    assert len(straight) == 7 and straight == scalars(tmp_path / "cut")


def fresh_optimizer(state):
    for moments in state["opt"]["state"].values():
        moments.update({name: torch.zeros_like(moment) for name, moment in moments.items()})


def back_to(name):
    def change(state):
        state[name] = {key: torch.zeros_like(value) if torch.is_tensor(value) else value
                       for key, value in state[name].items()}
    return change


@pytest.mark.parametrize("part, lose", [
    ("/model", back_to("model")), ("/ema", back_to("ema")), ("/opt", fresh_optimizer),
    ("/step", lambda state: state.update(step=2)), ("", lambda state: None),
    ("/schedule_sampler", back_to("schedule_sampler")), ("/guard", lambda state: state.pop("guard")),
], ids=["model", "ema", "opt", "step", "nothing", "schedule_sampler", "guard"])
def test_a_lost_part_is_noticed(command, tmp_path, part, lose):
    """The control: what each part of the state is needed for, the comparison above sees."""
    flags = [*DIGITS, *DROP, "--schedule-sampler", "loss-second-moment", "--max-loss-spike", 50]
    command("train", *flags, "--max-steps", 6, "--results-dir", tmp_path / "straight")
    command("train", *flags, "--max-steps", 3, "--results-dir", tmp_path / "cut")
    path = folder_of(tmp_path / "cut") / "checkpoints" / "0000003.pt"
    state = load_checkpoint(str(path))
    lose(state)
    save_checkpoint(str(path), state)
    status, _, err = command("train", *flags, "--max-steps", 6, "--results-dir", tmp_path / "cut", "--resume", "auto")
    assert status == 0, err
    found = differences(stored(tmp_path / "straight", 6), stored(tmp_path / "cut", 6))
    seen_in = "/model" if part == "/step" else part  # a step that was done twice is seen in the weights
    assert any(name.startswith(seen_in) for name in found) if part else found == []


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_processes(children, sources, tmp_path, before, after):
    """The same samples and noise; only sums are rounded otherwise."""
    flags = [*sources["cache"], "--num-workers", 0, "--log-every", 1]
    children.run("train", *flags, "--max-steps", 7, "--results-dir", tmp_path / "straight")
    children.run("train", *flags, "--max-steps", 4, "--results-dir", tmp_path / "cut", processes=before)
    children.run("train", *flags, "--max-steps", 7, "--results-dir", tmp_path / "cut", "--resume", "auto",
                 processes=after)
    straight, cut = scalars(tmp_path / "straight"), scalars(tmp_path / "cut")
    assert straight.keys() == cut.keys() == set(range(1, 8))
    assert all(abs(straight[step] - cut[step]) < 1e-5 for step in straight)


class SignalsItself:
    """Sends its own process a signal at the n-th part of a batch, before the gradients of that part."""

    def __init__(self, name, part):
        self.name, self.part = name, part

    def __call__(self, rank):
        losses, count = GaussianDiffusion.training_losses, [0]

        def signalled(*args, **more):
            count[0] += 1
            if count[0] == self.part:
                os.kill(os.getpid(), getattr(signal, self.name))
            return losses(*args, **more)

        GaussianDiffusion.training_losses = signalled


@pytest.mark.parametrize("name, status, reached", [("SIGTERM", EXIT_RESTARTABLE, 4), ("SIGKILL", -signal.SIGKILL, 2)])
def test_cut_inside_an_accumulation_window(children, tmp_path, name, status, reached):
    """In the third of four parts of step 4: what was accumulated is used up or lost, never carried along or saved."""
    flags = [*DIGITS, *DROP, "--grad-accum-steps", 4, "--ckpt-every", 2, "--max-steps", 7]
    children.run("train", *flags, "--results-dir", tmp_path / "straight")
    children.run("train", *flags, "--results-dir", tmp_path / "cut", prepare=SignalsItself(name, 3 * 4 + 3),
                 status=status)
    assert steps_of(tmp_path / "cut")[-1] == reached
    children.run("train", *flags, "--results-dir", tmp_path / "cut", "--resume", "auto")
    assert differences(stored(tmp_path / "straight", 7), stored(tmp_path / "cut", 7)) == []


# ---------------------------------------------------------------- 3: SIGKILL

LONG = [*DIGITS, *DROP, "--max-steps", 900, "--ckpt-every", 5, "--log-every", 1, "--keep-checkpoints", 3]


def test_twenty_kills_at_random(children, tmp_path):
    """At any moment the newest checkpoint is whole, and no more than one interval is lost; at last, nothing is."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    children.run("train", *LONG, "--results-dir", undisturbed)
    chance, kills = random.Random(0), 0
    while kills < 20:
        (child,) = children.start("train", *LONG, "--results-dir", killed, "--resume", "auto")
        signs = ("Beginning epoch", "step=") if kills else ("step=0000006",)  # the first checkpoint is there
        wait_for(lambda child=child, signs=signs: any(sign in child.log.read_text() for sign in signs)
                 or not child.is_alive())
        time.sleep(chance.random() * 0.15)
        assert child.is_alive(), child.log.read_text()
        child.kill()
        child.join()
        kills += 1
        reached = max(map(int, re.findall(r"\(step=(\d+)\)", child.log.read_text())), default=0)
        warnings = []
        path = latest_valid_checkpoint(str(folder_of(killed)), warnings.append)
        assert warnings == [] and (int(re.findall(r"(\d+)\.pt", path)[0]) if path else 0) >= reached - 5
    children.run("train", *LONG, "--results-dir", killed, "--resume", "auto")
    assert differences(stored(undisturbed, 900), stored(killed, 900)) == []
    left = sorted(path.name for path in (folder_of(killed) / "checkpoints").iterdir())
    assert left[-1] == "0000900.pt" and len(left) <= 4 and not any("tmp" in name for name in left)
    straight = scalars(undisturbed)
    assert all(straight[step] == loss for step, loss in scalars(killed).items())


class Dies:
    """Kills its own process at the n-th call of a function of `os`, before it or after it."""

    def __init__(self, name, call, after=False):
        self.name, self.call, self.after = name, call, after

    def __call__(self, rank):
        function, count = getattr(os, self.name), [0]

        def dying(*args, **more):
            count[0] += 1
            if count[0] == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **more)
            if count[0] == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, self.name, dying)


def dies_while_writing(rank):
    """In the middle of the second checkpoint's bytes."""
    save, count = torch.save, [0]

    def half(state, file):
        count[0] += 1
        if count[0] == 2:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = half


PHASES = {
    "in the middle of its bytes": dies_while_writing,
    "before its bytes are on the disk": Dies("fsync", 3),
    "before it has its name": Dies("replace", 2),
    "as soon as it has its name": Dies("replace", 2, after=True),
    "before the folder is on the disk": Dies("fsync", 4),
    "before an old one is removed": Dies("remove", 1),
    "when an old one is removed": Dies("remove", 1, after=True),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_each_phase_of_writing(children, tmp_path, phase, background):
    """What is there afterwards is whole; the next run goes on from it, cleans up, and ends as if nothing had been."""
    flags = [*DIGITS, *DROP, "--ckpt-every", 2, "--keep-checkpoints", 1, *(["--async-save"] if background else [])]
    children.run("train", *flags, "--max-steps", 6, "--results-dir", tmp_path / "straight")
    children.run("train", *flags, "--max-steps", 6, "--results-dir", tmp_path / "killed", prepare=PHASES[phase],
                 status=-signal.SIGKILL)
    warnings = []
    assert latest_valid_checkpoint(str(folder_of(tmp_path / "killed")), warnings.append) and warnings == []
    assert steps_of(tmp_path / "killed")[-1] in (2, 4)
    children.run("train", *flags, "--max-steps", 6, "--results-dir", tmp_path / "killed", "--resume", "auto")
    assert differences(stored(tmp_path / "straight", 6), stored(tmp_path / "killed", 6)) == []
    assert not list(folder_of(tmp_path / "killed").glob("checkpoints/*.tmp"))


# ---------------------------------------------------------------- 4: damaged checkpoints

def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"/data/0") + 2000] ^= 4
    path.write_bytes(raw)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"truncated": truncate, "a bit flipped": flip_a_bit, "empty": lambda path: path.write_bytes(b""),
           "missing": lambda path: path.unlink()}


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    results = tmp_path_factory.mktemp("three")
    call("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir", results)
    return results


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one(command, three_checkpoints, tmp_path, damage):
    """Is gone on from in the same folder, with a warning that names the file."""
    shutil.copytree(three_checkpoints, tmp_path / "results")
    path = folder_of(tmp_path / "results") / "checkpoints" / "0000006.pt"
    DAMAGES[damage](path)
    status, out, err = command("train", *DIGITS, "--max-steps", 6, "--ckpt-every", 2, "--results-dir",
                               tmp_path / "results", "--resume", "auto")
    assert status == 0 and "at step 4" in out, err
    assert (damage == "missing") or re.search(rf"WARNING: {path} .*trying the previous one", out)
    assert differences(stored(three_checkpoints, 6), stored(tmp_path / "results", 6)) == []
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_two_processes_agree_on_the_checkpoint(children, three_checkpoints, tmp_path):
    shutil.copytree(three_checkpoints, tmp_path / "results")
    flip_a_bit(folder_of(tmp_path / "results") / "checkpoints" / "0000006.pt")
    out = children.run("train", *DIGITS, "--max-steps", 8, "--results-dir", tmp_path / "results", "--resume", "auto",
                       processes=2)
    assert out.count("at step 4") == 1 and steps_of(tmp_path / "results") == [2, 4, 6, 8]


def test_nothing_but_damaged_checkpoints(command, three_checkpoints, tmp_path):
    """An error, never a start from scratch; nor is an older experiment taken instead."""
    shutil.copytree(three_checkpoints, tmp_path / "results")
    shutil.copytree(folder_of(three_checkpoints), tmp_path / "results" / "001-DiT-S-2")
    for path, damage in zip(folder_of(tmp_path / "results", 1).glob("checkpoints/*.pt"),
                            (truncate, flip_a_bit, DAMAGES["empty"])):
        damage(path)
    for resume in ("auto", tmp_path / "results" / "001-DiT-S-2"):
        status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", tmp_path / "results", "--resume",
                                 resume)
        assert status == 2 and "all 3 checkpoints in" in err and "are damaged" in err
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_a_damaged_checkpoint_that_was_named(command, three_checkpoints, tmp_path):
    """Whoever names a file wants that one."""
    shutil.copytree(three_checkpoints, tmp_path / "results")
    path = folder_of(tmp_path / "results") / "checkpoints" / "0000006.pt"
    flip_a_bit(path)
    status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", tmp_path / "results", "--resume",
                             path)
    assert status == 2 and f"{path} is damaged" in err


# ---------------------------------------------------------------- 5: how many are kept

@pytest.mark.parametrize("background", [[], ["--async-save"]])
def test_how_many_checkpoints_are_kept(command, tmp_path, background):
    """The newest two, every fourth, and the one that the run went on from."""
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path, *background]
    command("train", *flags, "--keep-every", 4, "--max-steps", 10)
    assert steps_of(tmp_path) == [4, 8, 9, 10]
    command("train", *flags, "--max-steps", 13, "--resume", "auto")
    assert steps_of(tmp_path) == [10, 12, 13]


def test_later_steps_of_another_run_do_not_count(command, tmp_path):
    """A damaged newest one must not push the good ones out."""
    flags = [*DIGITS, "--ckpt-every", 1, "--keep-checkpoints", 2, "--results-dir", tmp_path]
    command("train", *flags, "--max-steps", 3)
    for step in (98, 99):
        (folder_of(tmp_path) / "checkpoints" / f"{step:07d}.pt").write_bytes(b"")
    status, _, err = command("train", *flags, "--max-steps", 5, "--resume", "auto")
    assert status == 0 and steps_of(tmp_path) == [3, 4, 5, 98, 99], err


# ---------------------------------------------------------------- 6: disks

def small_files(rank):
    """A real limit on what a file may hold, on the main process: more than a log, less than a checkpoint."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("background", [[], ["--async-save"]])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_full(children, tmp_path, processes, background):
    """A sentence on it, all end with status 2 at once, and the earlier checkpoint is what it was."""
    flags = [*DIGITS, "--ckpt-every", 2, "--results-dir", tmp_path, *background]
    children.run("train", *flags, "--max-steps", 2, processes=processes)
    before = (folder_of(tmp_path) / "checkpoints" / "0000002.pt").read_bytes()
    start = time.monotonic()
    out = children.run("train", *flags, "--max-steps", 2000, "--resume", "auto", processes=processes,
                       prepare=small_files, status=2)
    assert time.monotonic() - start < 20
    assert out.count("cannot write") == 1 and "0000004.pt" in out and "Traceback" not in out
    assert os.listdir(folder_of(tmp_path) / "checkpoints") == ["0000002.pt"]
    assert (folder_of(tmp_path) / "checkpoints" / "0000002.pt").read_bytes() == before


def observers_on_a_full_disk(rank):
    """Neither log.txt, nor TensorBoard, nor a picture can be written."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    SummaryWriter.add_scalar = SummaryWriter.add_image = training.logger.save_image_grid = full
    open_file = logging.FileHandler._open

    class FullFile:
        write = flush = staticmethod(full)

        def __init__(self, file):
            self.close = file.close

    logging.FileHandler._open = lambda handler: FullFile(open_file(handler))


@pytest.mark.parametrize("processes", [1, 2])
def test_observers_that_cannot_write(children, tmp_path, processes):
    """Are told off, and end nothing."""
    out = children.run("train", *DIGITS, "--log-every", 1, "--sample-every", 2, "--max-steps", 6, "--results-dir",
                       tmp_path, processes=processes, prepare=observers_on_a_full_disk)
    assert "training continues without TensorBoard" in out and "(step=0000006)" in out and steps_of(tmp_path) == [6]
    assert "Traceback" not in out and "Logging error" not in out


BROKEN = {
    "a whole number": lambda state: 5, "no config": lambda state: state | dict(config=None),
    "flags": lambda state: state | dict(args=5), "optimiser": lambda state: state | dict(opt={}),
    "no moments": lambda state: state | dict(opt=state["opt"] | dict(state={})),
    "moments of another shape": lambda state: state | dict(opt=state["opt"] | dict(state={
        i: moments | dict(exp_avg=torch.zeros(3)) for i, moments in state["opt"]["state"].items()})),
    "step as text": lambda state: state | dict(step="6"), "a negative step": lambda state: state | dict(step=-5),
    "guard": lambda state: state | dict(guard=dict(allows=3)), "weights": lambda state: state | dict(model=7),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_checkpoints_that_say_what_cannot_be(command, three_checkpoints, tmp_path, broken):
    """Whole, loadable, and not ours: a sentence, and no step is taken."""
    shutil.copytree(three_checkpoints, tmp_path / "results")
    path = folder_of(tmp_path / "results") / "checkpoints" / "0000006.pt"
    save_checkpoint(str(path), BROKEN[broken](load_checkpoint(str(path))))
    status, _, err = command("train", *DIGITS, "--max-steps", 8, "--results-dir", tmp_path / "results", "--resume",
                             path)
    assert status == 2 and str(path) in err and "Traceback" not in err, err
    assert steps_of(tmp_path / "results") == [2, 4, 6]


# ---------------------------------------------------------------- 7: being told to stop

@pytest.mark.parametrize("name, processes, workers", [
    ("SIGTERM", 1, 0), ("SIGUSR1", 1, 2), ("SIGTERM", 2, 1), ("SIGUSR1", 2, 0)])
def test_a_signal_saves_and_stops(children, sources, tmp_path, name, processes, workers):
    """On any one process, or on all of its group; the next start goes on exactly."""
    flags = [*sources["cache"], "--max-steps", 300, "--log-every", 1, "--num-workers", workers]
    group = children.start("train", *flags, "--results-dir", tmp_path / "cut", processes=processes)
    wait_for(lambda: "(step=0000007)" in group[0].log.read_text())
    last = psutil.Process(group[-1].pid)
    for process in [last, *(last.children() if workers else [])]:
        process.send_signal(getattr(signal, name))
    for child in group:
        child.join(60)
    text = group[0].log.read_text()
    assert [child.exitcode for child in group] == [EXIT_RESTARTABLE] * processes, text
    (done,) = steps_of(tmp_path / "cut")
    assert 7 <= done < 300 and f"after {done} steps; --resume auto continues" in text and "Traceback" not in text
    flags[flags.index(300)] = done + 5
    out = children.run("train", *flags, "--results-dir", tmp_path / "cut", "--resume", "auto", processes=processes)
    assert f"at step {done}" in out
    children.run("train", *flags, "--results-dir", tmp_path / "straight", processes=processes)
    assert differences(stored(tmp_path / "straight", done + 5), stored(tmp_path / "cut", done + 5)) == []


def told_at_the_start(rank):
    """The last process gets SIGTERM before anything is made or read."""
    import train
    prepare = train.prepare

    def told(*args):
        if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*args)

    train.prepare = told


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_at_the_start(children, tmp_path, processes):
    """Is not lost: the run saves after its first steps."""
    children.run("train", *DIGITS, "--max-steps", 300, "--results-dir", tmp_path, processes=processes,
                 prepare=told_at_the_start, status=EXIT_RESTARTABLE)
    assert steps_of(tmp_path) == [processes]


# ---------------------------------------------------------------- what loads the data

def ruin_an_image(folder, child):
    """An image that could be read until now; returns what repairs it, and what is said of it."""
    path = folder / "bee" / "3.png"
    raw = path.read_bytes()
    path.write_bytes(raw[:50])
    return lambda: path.write_bytes(raw), f"cannot read the image {path}"


def kill_a_worker(folder, child):
    psutil.Process(child.pid).children()[0].kill()
    return lambda: None, "a process that loads data died"


@pytest.mark.parametrize("fault, processes, workers", [
    (ruin_an_image, 1, 0), (ruin_an_image, 1, 2), (ruin_an_image, 2, 0), (ruin_an_image, 2, 1),
    (kill_a_worker, 1, 2), (kill_a_worker, 2, 1)])
def test_a_fault_of_the_data_saves_and_ends(children, image_folder, vae_folder, tmp_path, fault, processes, workers):
    """On one process: all save after the same step and end with a sentence; the next start goes on exactly."""
    shutil.copytree(image_folder, tmp_path / "images")
    flags = ["--data-path", tmp_path / "images", "--image-size", 32, "--vae", vae_folder, *TINY, "--num-classes", 3,
             "--global-batch-size", 8, *DROP, "--num-workers", workers, "--log-every", 1]
    group = children.start("train", *flags, "--max-steps", 3000, "--results-dir", tmp_path / "cut",
                           processes=processes)
    wait_for(lambda: "(step=0000005)" in group[0].log.read_text())
    repair, sentence = fault(tmp_path / "images", group[-1])
    for child in group:
        child.join(60)
    text = "".join(child.log.read_text() for child in group)
    assert [child.exitcode for child in group] == [2] * processes, text
    assert text.count("error:") == 1 and sentence in text and "Traceback" not in text, text
    (done,) = steps_of(tmp_path / "cut")
    repair()
    children.run("train", *flags, "--max-steps", done + 4, "--results-dir", tmp_path / "cut", "--resume", "auto",
                 processes=processes)
    children.run("train", *flags, "--max-steps", done + 4, "--results-dir", tmp_path / "straight", processes=processes)
    assert differences(stored(tmp_path / "straight", done + 4), stored(tmp_path / "cut", done + 4)) == []


def test_a_worker_dies_while_its_master_computes(tmp_path):
    """Not there and then, where the optimiser may be half done; when the next batch is waited for."""
    files = {f"a/{i}.png": Image.fromarray(picture(8, 8, 3, seed=i)) for i in range(8)}
    data = ImageFolderDataset(write_images(tmp_path, files), 8)
    order = StepBatchSampler(8, 2, slice(0, 2), 0, 0, 5000, flips=False)
    others = psutil.Process().children()
    loader = PrefetchLoader(data, order, 1, torch.device("cpu"), pytest.fail)
    batches = iter(loader)
    next(batches)
    (worker,) = [child for child in psutil.Process().children() if child not in others]
    worker.kill()
    wait_for(lambda: worker.status() == psutil.STATUS_ZOMBIE)
    time.sleep(0.1)  # the signal is answered here, if anywhere
    assert loader.fault is None
    with pytest.raises(UserError, match="a process that loads data died"):
        list(batches)


# ---------------------------------------------------------------- 8, 9: other processes


def hangs_at_the_start(rank):
    if rank == 1:
        import train
        train.prepare = lambda *args: time.sleep(60)


def test_a_process_that_hangs_at_the_start(children, tmp_path):
    group = children.start("train", *DIGITS, "--dist-timeout", 0.1, "--results-dir", tmp_path, processes=2,
                           prepare=hangs_at_the_start)
    group[0].join(40)
    text = group[0].log.read_text()
    assert group[0].exitcode == 2 and "error: the start: another process is gone, or did not answer" in text, text
    assert "Traceback" not in text
    group[1].kill()

def test_torchrun_restarts_a_run(sources, tmp_path):
    """A process dies; all are started again, and the end is that of an undisturbed run."""
    flags = [*sources["cache"], "--max-steps", 60, "--num-workers", 0, "--ckpt-every", 4, "--resume", "auto"]

    def launch(results, restarts):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", ROOT / "train.py", *flags,
                   "--results-dir", results]
        return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                env=dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))

    launcher = launch(tmp_path / "died", restarts=1)
    wait_for(lambda: list((tmp_path / "died").glob("*/checkpoints/0000008.pt")))
    workers = [child for child in psutil.Process(launcher.pid).children(recursive=True)
               if "train.py" in " ".join(child.cmdline())]
    workers[-1].kill()
    assert launcher.wait(120) == 0
    log = (folder_of(tmp_path / "died") / "log.txt").read_text()
    assert log.count("Resuming from") == 1 and log.count("Done!") == 1
    assert launch(tmp_path / "straight", restarts=0).wait(120) == 0
    assert differences(stored(tmp_path / "straight", 60), stored(tmp_path / "died", 60)) == []


def test_a_hung_process_is_told(children, tmp_path):
    """Within the stated time, and what was waited for."""
    flags = [*DIGITS, "--max-steps", 100000, "--log-every", 1, "--dist-timeout", 0.1, "--results-dir", tmp_path]
    group = children.start("train", *flags, processes=2)
    wait_for(lambda: "(step=0000005)" in group[0].log.read_text())
    os.kill(group[1].pid, signal.SIGSTOP)
    start = time.monotonic()
    group[0].join(60)
    text = group[0].log.read_text()
    assert time.monotonic() - start < 20 and group[0].exitcode == 2, text
    assert re.search(r"error: training step \d+: .*did not answer within 0.1 minutes", text)
    group[1].kill()


# ---------------------------------------------------------------- 10: what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(children, tmp_path, value, processes):
    """On one process: on all, weights, EMA, optimiser and timestep sampler stay; the step counts, its sample is named.
    """
    flags = [*DIGITS, "--ckpt-every", 1, "--log-every", 1, "--max-steps", 5, "--results-dir", tmp_path,
             "--schedule-sampler", "loss-second-moment"]
    out = children.run("train", *flags, processes=processes, prepare=Spoils([2], value, rank=processes - 1))
    states = {step: stored(tmp_path, step) for step in range(1, 6)}
    assert [name for name in differences(states[2], states[3]) if name.startswith(STATE)] == []
    for step in (1, 3, 4):
        changed = differences(states[step], states[step + 1])
        assert all(any(name.startswith(part) for name in changed) for part in STATE)
    assert states[5]["guard"]["total"] == 1 and states[5]["step"] == 5
    share = 8 // processes
    items = StepBatchSampler(1438, 8, slice(0, share), 0, 0, 5, flips=False).items(2)
    (line,) = set(re.findall(r"WARNING: (\(step=0000003\) .*)", out))
    assert f"samples whose loss is non-finite: {items[processes - 1][1]}" in line
    assert "none of the last 1 steps was applied" in out and (3 not in scalars(tmp_path))


def test_too_many_bad_steps_end_the_run(children, tmp_path):
    """In a row; one good step between them begins the count anew. The last good state is saved, and can be resumed."""
    flags = [*DIGITS, "--max-bad-steps", 3, "--results-dir", tmp_path]
    out = children.run("train", *flags, "--max-steps", 20, processes=2, status=2,
                       prepare=Spoils([1, 2, 4, 5, 6, 7, 8], float("nan"), rank=1))
    assert "3 steps in a row could not be applied (--max-bad-steps)" in out and steps_of(tmp_path) == [7]
    saved = stored(tmp_path, 7)
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())
    assert str(folder_of(tmp_path) / "checkpoints" / "0000007.pt") in out and saved["guard"]["total"] == 5
    children.run("train", *flags, "--max-steps", 9, "--resume", "auto", processes=2)
    assert steps_of(tmp_path) == [7, 9]


def test_a_loss_that_jumps(children, tmp_path):
    """--max-loss-spike: compared with the average of the last 100 losses over all processes; off, it is applied."""
    flags = [*DIGITS, "--max-steps", 106, "--log-every", 1]
    prepare = Spoils([50, 104], 200.0, rank=1)
    out = children.run("train", *flags, "--max-loss-spike", 5, "--results-dir", tmp_path / "on", processes=2,
                       prepare=prepare)
    bad = set(re.findall(r"WARNING: \(step=(\d+)\) not applied, its loss (\S+) is more than 5 times", out))
    assert [step for step, _ in bad] == ["0000105"]
    assert scalars(tmp_path / "on")[51] > 5
    off = children.run("train", *flags, "--results-dir", tmp_path / "off", processes=2, prepare=prepare)
    assert "not applied" not in off and scalars(tmp_path / "off")[105] > 5


# ---------------------------------------------------------------- 11: in the background

def slow_disk(rank):
    save = training.checkpoint_manager.save_checkpoint

    def slow(path, state):
        time.sleep(0.3)
        save(path, state)

    training.checkpoint_manager.save_checkpoint = slow


def test_saved_in_the_background(children, tmp_path):
    """The values of the moment of the call, while training runs ahead; the end waits for the last one."""
    flags = [*DIGITS, *DROP, "--schedule-sampler", "loss-second-moment", "--max-steps", 60, "--ckpt-every", 20,
             "--log-every", 1]
    children.run("train", *flags, "--results-dir", tmp_path / "plain")
    out = children.run("train", *flags, "--async-save", "--results-dir", tmp_path / "background", prepare=slow_disk)
    assert steps_of(tmp_path / "background") == [20, 40, 60] and "Done!" in out
    for step in (20, 40, 60):
        assert differences(stored(tmp_path / "plain", step), stored(tmp_path / "background", step)) == []


# ---------------------------------------------------------------- 12: untrusted files

def test_a_link_is_not_written_through(tmp_path):
    """Where a link lies in the place of a temporary file, what it points to stays."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f"0000001.pt.{os.getpid()}.tmp").symlink_to(precious)
    (tmp_path / "0000001.pt").symlink_to(precious)
    save_checkpoint(str(tmp_path / "0000001.pt"), dict(step=1))
    assert precious.read_text() == "mine" and not (tmp_path / "0000001.pt").is_symlink()
    assert load_checkpoint(str(tmp_path / "0000001.pt")) == dict(step=1)


# ---------------------------------------------------------------- 14, 15

def test_other_flags_need_to_be_confirmed(command, three_checkpoints, tmp_path):
    """Every difference is named, with both values; --allow-config-change accepts them. What does not change the run is free."""
    shutil.copytree(three_checkpoints, tmp_path / "results")
    again = [*DIGITS, "--max-steps", 7, "--results-dir", tmp_path / "results", "--resume", "auto"]
    changed = ["--lr", 0.5, "--global-batch-size", 16, "--ema-decay", 0.5]
    status, _, err = command("train", *again, *changed)
    for sentence in ("--lr is 0.5, it was 0.0001", "--global-batch-size is 16, it was 8",
                     "--ema-decay is 0.5, it was 0.9999", "--allow-config-change"):
        assert status == 2 and sentence in err
    assert steps_of(tmp_path / "results") == [2, 4, 6]
    status, out, _ = command("train", *again, *changed, "--allow-config-change")
    assert status == 0 and out.count("(--allow-config-change)") == 3
    status, _, err = command("train", *again, "--depth", 2, "--allow-config-change")
    assert status == 2 and "is of another model" in err
    status, out, _ = command("train", *again, *changed, "--max-steps", 8, "--log-every", 1, "--num-workers", 1,
                             "--keep-checkpoints", 9, "--async-save", "--grad-accum-steps", 2)
    assert status == 0 and "WARNING" not in out


def test_other_images_need_to_be_confirmed(command, image_folder, tmp_path):
    """Another place is free; another number of images is not."""
    flags = ["--image-size", 32, "--vae", "none", "--num-classes", 3, *TINY, "--global-batch-size", 8, "--num-workers",
             0, "--results-dir", tmp_path / "results", "--model", "DiT-S/8"]
    command("train", "--data-path", image_folder, *flags, "--max-steps", 1)
    shutil.copytree(image_folder, tmp_path / "moved")
    status, _, err = command("train", "--data-path", tmp_path / "moved", *flags, "--max-steps", 2, "--resume", "auto")
    assert status == 0, err
    next(tmp_path.glob("moved/bee/*.png")).unlink()
    status, _, err = command("train", "--data-path", tmp_path / "moved", *flags, "--max-steps", 3, "--resume", "auto")
    assert status == 2 and "the data have num images 23, they had 24" in err


def test_observers_do_not_disturb(command, sources, tmp_path):
    """Logging, pictures and checkpoints, often or never: the same run bit for bit."""
    flags = [*sources["cache"], "--num-workers", 0, "--max-steps", 9]
    command("train", *flags, "--results-dir", tmp_path / "quiet", "--log-every", 1000)
    status, _, err = command("train", *flags, "--results-dir", tmp_path / "loud", "--log-every", 1, "--sample-every", 4,
                             "--ckpt-every", 1, "--async-save")
    assert status == 0, err
    assert len(list(folder_of(tmp_path / "loud").glob("samples/*.png"))) == 2
    assert differences(stored(tmp_path / "quiet", 9), stored(tmp_path / "loud", 9)) == []


# ---------------------------------------------------------------- 16: sets of samples

def test_ten_kills_of_a_set_of_samples(children, three_checkpoints, tmp_path):
    """SIGKILL at random moments; the .npz is that of an undisturbed run, bit for bit."""
    ckpt = folder_of(three_checkpoints) / "checkpoints" / "0000006.pt"
    flags = ["--ckpt", ckpt, "--num-fid-samples", 400, "--per-proc-batch-size", 4, "--num-sampling-steps", 5]
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "straight")
    chance, kills = random.Random(0), 0
    while kills < 10:
        (child,) = children.start("sample_ddp", *flags, "--sample-dir", tmp_path / "killed")
        before = len(list((tmp_path / "killed").glob("*/parts/*.npz")))
        wait_for(lambda child=child, before=before: not child.is_alive()
                 or len(list((tmp_path / "killed").glob("*/parts/*.npz"))) > before)
        time.sleep(chance.random() * 0.05)
        assert child.is_alive(), "it ended before it could be killed ten times: ask for more samples"
        child.kill()
        child.join()
        kills += 1
    children.run("sample_ddp", *flags, "--sample-dir", tmp_path / "killed")
    (straight,), (killed,) = (list((tmp_path / name).glob("*.npz")) for name in ("straight", "killed"))
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json", ".npz"]
    assert straight.read_bytes() == killed.read_bytes()
