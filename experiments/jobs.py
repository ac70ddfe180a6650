"""Commands that run once: a finished one is not repeated, several run at once, and one that was killed continues."""
import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import EXIT_RESTARTABLE, Stopped, UserError
from common.files import sha256_file
from common.signals import StopSignals
from evaluation.records import try_read, write_record

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command that is done when its record FOLDER/NAME.json answers the same request."""

    folder: str  # where the work is kept; one study at a time runs tasks in it
    name: str  # path of the task's files below the folder, without an ending: .json, .log, .seconds
    request: dict  # what the result depends on, plain values
    argv: tuple = ()  # the command after the interpreter
    output: str = None  # the file that the command makes, if that is the result; the record has its checksum
    # Otherwise, () -> what the record holds, None if the result is missing; without it the command writes the record.
    collect: Callable = None
    cost: float = 0  # estimated work in any unit; the most expensive task starts first
    disk_bytes: int = 0  # size of what the command keeps
    needs: "Task" = None  # the task whose result this one uses
    # The classifier in whose features the result is measured, if any: with a new one the task is not done.
    classifier: "Task" = None
    parts: tuple = ()  # tasks that the command does, instead of having a result of its own

    @property
    def path(self):
        """Path of the task's files without an ending."""
        return os.path.join(self.folder, self.name)

    def full_request(self):
        """Return the request with the checksum of the classifier, as the record has it."""
        judge = dict(classifier=self.classifier.record().get("sha256")) if self.classifier else {}
        return json.loads(json.dumps(self.request | judge))  # tuples become lists

    def record(self):
        """Return the record of the finished task; {} if there is none for this request."""
        record = try_read(self.path + ".json")
        return record if record.get("asked") == self.full_request() else {}

    def is_done(self):
        """Return whether there is nothing left to do."""
        if self.parts:
            return all(part.is_done() for part in self.parts)
        return bool(self.record()) and (not self.output or os.path.exists(self.output))

    def seconds(self):
        """Return the time of all starts of the command, whichever study needed it first."""
        with contextlib.suppress(OSError), open(self.path + ".seconds") as file:
            return round(sum(map(float, file.read().split())), 1)
        return 0.0


class RunningTask:
    """A task whose command runs in a process, which inherits the file `lock`."""

    def __init__(self, task, threads, lock):
        self.task, self.start, self.log = task, time.monotonic(), task.path + ".log"
        os.makedirs(os.path.dirname(task.path), exist_ok=True)
        self.command = [sys.executable, *map(str, task.argv)]
        self.process = start_process(self.command, self.log, threads, lock)

    def wait(self):
        """Wait for the end of the process, note how long it ran, and return its exit status."""
        status = self.process.wait()
        with open(self.task.path + ".seconds", "a") as file:
            file.write(f"\n{time.monotonic() - self.start:.1f}")
        return status

    def finish(self):
        """Write the record of an ended process. Raises `Stopped` if a signal ended it, `UserError` if it failed."""
        status, task = self.wait(), self.task
        if status == EXIT_RESTARTABLE:
            raise Stopped
        if status:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                tail = "\n".join(file.read().splitlines()[-5:])
            raise UserError(f"{task.name} failed with exit status {status}: {shlex.join(self.command)}\n{tail}\n"
                            f"(full log: {self.log})")
        values = task.collect() if task.collect else None
        if task.output and os.path.exists(task.output):
            values = dict(sha256=sha256_file(task.output))
        if values is not None:
            write_record(task.path + ".json", dict(asked=task.full_request(), seconds=task.seconds()) | values)
        if not task.is_done():
            raise UserError(f"{task.name} ended without its result; see {self.log}")


def start_process(command, log, threads, lock):
    """Start a command in the project's folder; its output is appended to the file `log`."""
    environment = os.environ | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
    with open(log, "a") as output:
        # A new session: Ctrl-C reaches the study alone, which then tells its processes to save and end.
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output, pass_fds=[lock.fileno()], start_new_session=True,
                                preexec_fn=_stop_with_parent)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _stop_with_parent():
    """In a new process: ask the kernel for SIGTERM when the parent is killed (Linux only)."""
    if _LIBC:
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)


def _acquire(lock, check, log):
    """Wait for the lock of a folder, calling `check`.

    Child processes inherit it: after a kill, the next study waits for what the killed one left running.
    """
    for attempt in itertools.count():
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if attempt == 0:
            log(f"another study, or a process of a killed one, works in {os.path.dirname(lock.name)}: waiting for it")
        check()
        time.sleep(0.2)


def run_tasks(tasks, workers, threads=1, deadline=None, log=print):
    """Run the tasks that are not done, `workers` at once.

    Args:
        tasks (list[Task]): Tasks of one folder that do not need each other's results.
        workers (int): Number of processes.
        threads (int): CPU threads of each process; None: torch's default.
        deadline (float): Value of `time.monotonic()` at which the processes are asked to save and stop.
        log (callable): Called with lines of progress.

    Raises:
        Stopped: At the deadline, and on SIGTERM or SIGUSR1, once the processes have saved.
        UserError: If a task fails.
    """
    if all(task.is_done() for task in tasks):
        return
    os.makedirs(tasks[0].folder, exist_ok=True)
    with StopSignals() as signals, open(os.path.join(tasks[0].folder, "lock"), "a") as lock:
        def check():
            if signals.received or (deadline is not None and time.monotonic() > deadline):
                raise Stopped

        _acquire(lock, check, log)
        running, waiting = [], sorted((task for task in tasks if not task.is_done()), key=lambda task: -task.cost)
        count = len(waiting)
        try:
            while waiting or running:
                check()
                while waiting and len(running) < workers:
                    running.append(RunningTask(waiting.pop(0), threads, lock))
                time.sleep(0.05)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    job.finish()
                    log(f"[{count - len(waiting) - len(running)}/{count}] {job.task.name}: "
                        f"{time.monotonic() - job.start:.0f} s")
        finally:
            for job in running:  # all at once, so that each has as long to save as the others
                job.process.terminate()
            for job in running:
                job.wait()
