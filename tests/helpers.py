"""Running commands, and planting faults in them."""
import contextlib
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from common.errors import ArgumentError
from diffusion import GaussianDiffusion

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "DiT-S/2", "--depth", "1", "--hidden-size", "16", "--num-heads", "2"]
DIGITS = ["--data-path", "digits", *TINY, "--global-batch-size", "8"]
DROP = ["--class-dropout-prob", 0.5]
ENDLESS = ["--max-steps", 10**6]
PIXELS = ["--features", "pixels"]
FEW_SAMPLES = ["--num-fid-samples", 16, "--per-proc-batch-size", 4, "--num-sampling-steps", "ddim3", "--cfg-scale", 2]


def call(name, *flags):
    """Run a command's main function in this process; its errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        importlib.import_module(name).main()


def run_process(script, *flags, processes=None, check=True, **kwargs):
    """Run a command as a user does: `python SCRIPT`, or `torchrun` on several gloo processes."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master-addr=127.0.0.1",
                     f"--master-port={free_port()}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, flags)], env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=600, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class Children:
    """Run commands in processes that a server forks, which has imported everything; their output goes to a folder."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train", "sample_ddp", "extract_features", "evaluate",
                                             "torch.utils.tensorboard",
                                             "diffusers.models.autoencoders.autoencoder_kl"])

    def start(self, name, *flags, processes=1, prepare=None):
        """Start a command on several gloo processes and return them; each has the path of its output in `log`.

        `prepare` is called with the rank before the command begins, to plant a fault; it must be picklable.
        """
        port, group = str(free_port()), []
        for rank in range(processes):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=port,
                               MASTER_ADDR="127.0.0.1") if processes > 1 else {}
            log = self.folder / f"{len(self.started)}.log"
            child = self.context.Process(target=run_child, args=(name, [str(flag) for flag in flags], environment,
                                                                 str(log), prepare, rank))
            log.touch()
            child.start()
            child.log = log
            group.append(child)
            self.started.append(child)
        return group

    def run(self, name, *flags, processes=1, prepare=None, status=0):
        """Run a command to its end and return the output of all processes; each must exit with `status`."""
        return self.join(self.start(name, *flags, processes=processes, prepare=prepare), status)

    def join(self, group, status=0):
        """Wait for a group of processes and return their output; each must exit with `status`."""
        for child in group:
            child.join(300)
        text = "".join(child.log.read_text() for child in group)
        assert [child.exitcode for child in group] == [status] * len(group), text
        return text

    def kill_during(self, name, *flags, when, delay, prepare=None):
        """Start a command, kill it `delay` seconds after `when(its output)` is true, and return its output."""
        (child,) = self.start(name, *flags, prepare=prepare)
        wait_for(lambda: when(child.log.read_text()) or not child.is_alive())
        time.sleep(delay)
        assert child.is_alive(), child.log.read_text()
        child.kill()
        child.join()
        return child.log.read_text()

    def close(self):
        """Kill what still runs."""
        for child in self.started:
            if child.is_alive():
                child.kill()


def run_child(name, flags, environment, log, prepare, rank):
    """Run a command in this child process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default on Linux, which its data workers use
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{name}.py", *flags]
    if prepare is not None:
        prepare(rank)
    from common.errors import run_command
    run_command(importlib.import_module(name).main)


def wait_for(condition, seconds=120):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not true after {seconds} seconds"
        time.sleep(0.01)
    return value


_PORTS = itertools.count(20_000 + os.getpid() * 37 % 10_000)


def free_port():
    """Return an unused port below the range from which systems choose ports, where it may be taken meanwhile."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class AtCall:
    """Call `action`, which must be picklable, at the n-th call of a function (None: each), on one rank or on all.

    `function` is its full name, such as "os.fsync"; with `after`, the action follows the call.
    """

    def __init__(self, function, count, action, rank=None, after=False):
        self.function, self.count, self.action, self.rank, self.after = function, count, action, rank, after

    def __call__(self, rank):
        if self.rank not in (None, rank):
            return
        owner, _, name = self.function.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        function, calls = getattr(owner, name), itertools.count(1)

        def with_action(*args, **kwargs):
            is_due = next(calls) == self.count or self.count is None
            if is_due and not self.after:
                self.action()
            result = function(*args, **kwargs)
            if is_due and self.after:
                self.action()
            return result

        setattr(owner, name, with_action)


AtLoss = partial(AtCall, "diffusion.GaussianDiffusion.training_losses")  # once per microbatch


def send_signal(number=signal.SIGKILL):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


class SpoilLoss:
    """Multiply the loss of a row of the local batch by a value, in some steps (from 0), on one rank or on all."""

    def __init__(self, steps, value, rank=None, row=1):
        self.steps, self.value, self.rank, self.row = set(steps), value, rank, row

    def __call__(self, rank):
        if self.rank not in (None, rank):
            return
        training_losses, calls = GaussianDiffusion.training_losses, itertools.count()

        def spoiled(*args, **kwargs):
            terms = training_losses(*args, **kwargs)
            if next(calls) in self.steps:
                factor = torch.ones_like(terms["loss"])
                factor[self.row] = self.value
                terms["loss"] = terms["loss"] * factor
            return terms

        GaussianDiffusion.training_losses = spoiled


@contextlib.contextmanager
def raises_argument(match=None, **arguments):
    """Expect an `ArgumentError` about these parameters and values."""
    with pytest.raises(ArgumentError, match=match) as caught:
        yield
    assert caught.value.arguments == arguments


class Recompilations:
    """Count the graphs that are compiled in this context, and the breaks in them."""

    def __enter__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return self

    def __exit__(self, *error):
        torch._dynamo.reset()

    @property
    def graphs(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @property
    def breaks(self):
        return sum(torch._dynamo.utils.counters["graph_break"].values())
