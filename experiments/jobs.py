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
from dataclasses import dataclass

from common.errors import EXIT_RESTARTABLE, Stopped, UserError
from common.files import sha256_file
from common.signals import StopSignals
from evaluation.records import try_read, write_record

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command that is done when its record FOLDER/NAME.json answers the same request.

    Attributes:
        folder (str): Where the work is kept; one study at a time runs tasks in it.
        name (str): Path of the task's files below `folder`, without an ending.
        request (dict): What the result depends on, plain values.
        argv (tuple): The command after the interpreter.
        output (str): The file that the command makes, if it does not write the record itself.
        cost (float): Estimated work in any unit; the most expensive task starts first.
        classifier (Task): The classifier in whose features the result is measured, or None. Results of different
            classifiers are not comparable, so that with a new one the task is not done.
    """

    folder: str
    name: str
    request: dict
    argv: tuple = ()
    output: str = None
    cost: float = 0
    classifier: "Task" = None

    @property
    def path(self):
        """Path of the task's files without an ending: .json, .log, .seconds."""
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
        return bool(self.record()) and (not self.output or os.path.exists(self.output))

    def command(self):
        """Return the command line after the interpreter."""
        return [str(argument) for argument in self.argv]

    def collect(self):
        """Return what the record holds after a successful run; None: the command wrote it, or must run again."""
        return dict(sha256=sha256_file(self.output)) if self.output and os.path.exists(self.output) else None

    def seconds(self):
        """Return the time of all starts of the command, whichever study needed it first."""
        try:
            with open(self.path + ".seconds") as file:
                return float(file.read())
        except (OSError, ValueError):
            return 0.0


class RunningTask:
    """A task whose command runs in a process, which inherits the file `lock`."""

    def __init__(self, task, threads, lock):
        self.task, self.start, self.log = task, time.monotonic(), task.path + ".log"
        os.makedirs(os.path.dirname(task.path), exist_ok=True)
        self.command = [sys.executable, *task.command()]
        self.process = start_process(self.command, self.log, threads, lock)

    def count_seconds(self):
        """Add the time of this start to the task's and return the sum."""
        seconds = round(self.task.seconds() + time.monotonic() - self.start, 1)
        with open(self.task.path + ".seconds", "w") as file:
            file.write(f"{seconds}")
        return seconds

    def has_ended(self):
        """Return whether the task is done. Raises `Stopped` if it was stopped by a signal, `UserError` if it failed."""
        status = self.process.poll()
        if status is None:
            return False
        task, seconds = self.task, self.count_seconds()
        if status == EXIT_RESTARTABLE:
            raise Stopped
        if status:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                tail = "\n".join(file.read().splitlines()[-5:])
            raise UserError(f"{task.name} failed with exit status {status}: {shlex.join(self.command)}\n{tail}\n"
                            f"(full log: {self.log})")
        if (values := task.collect()) is not None:
            write_record(task.path + ".json", dict(asked=task.full_request(), seconds=seconds) | values)
        if not task.is_done():
            raise UserError(f"{task.name} ended without its result; see {self.log}")
        return True


def start_process(command, log, threads, lock):
    """Start a command in the project's folder; its output is appended to the file `log`."""
    environment = os.environ | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
    with open(log, "a") as output:
        # A new session: Ctrl-C reaches the study alone, which then tells its processes to save and end.
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output, pass_fds=[lock.fileno()], start_new_session=True,
                                preexec_fn=_stop_with_parent)


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _stop_with_parent():
    """In a new process: ask the kernel for SIGTERM when the parent is killed (Linux only)."""
    if _LIBC:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def exclusive_lock(folder, check, log):
    """Wait until no other study works in a folder, calling `check`, and hold its lock file in the block.

    Child processes inherit the lock: after a kill, the next study waits for what the killed one left running.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "a") as lock:
        for attempt in itertools.count():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if attempt == 0:
                log(f"another study, or a process of a killed one, works in {folder}: waiting for it")
            check()
            time.sleep(0.2)
        yield lock


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
    running = []
    with StopSignals() as signals:
        def check():
            if signals.received or (deadline is not None and time.monotonic() > deadline):
                raise Stopped

        with exclusive_lock(tasks[0].folder, check, log) as lock:
            waiting = sorted((task for task in tasks if not task.is_done()), key=lambda task: -task.cost)
            count = len(waiting)
            try:
                while waiting or running:
                    check()
                    while waiting and len(running) < workers:
                        running.append(RunningTask(waiting.pop(0), threads, lock))
                    time.sleep(0.05)
                    for job in [job for job in running if job.has_ended()]:
                        running.remove(job)
                        log(f"[{count - len(waiting) - len(running)}/{count}] {job.task.name}: "
                            f"{time.monotonic() - job.start:.0f} s")
            finally:
                _stop_all(running)


def _stop_all(jobs):
    alive = [job for job in jobs if job.process.poll() is None]
    for job in alive:  # all at once, so that each has as long to save as the others
        job.process.terminate()
    for job in alive:
        job.process.wait()
        job.count_seconds()
