"""Pieces of work: commands that go on where they were, run side by side. What is done is never done again."""

import contextlib
import ctypes
import fcntl
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


def to_json_types(values):
    """Values as they come back from JSON: tuples as lists."""
    return json.loads(json.dumps(values))


class Task:
    """Work that is done once, by one command. Subclasses have these:

    folder   where the studies' work is kept
    name     of this one; its files begin with FOLDER/NAME
    cost     about how much work it is, in any unit: the largest is begun first
    command()          the command line after the interpreter
    is_done()          whether nothing is left to do
    finish(seconds)    called after the command ended well; seconds: that it took, with those of earlier, broken starts
    """

    @property
    def path(self):
        return os.path.join(self.folder, self.name)

    def metadata(self):
        """What is known of it once it is done; {} before, and where something else was asked for then."""
        found = try_read(self.path + ".json")
        return found if found.get("asked") == to_json_types(self.asked) else {}

    def is_done(self):
        return bool(self.metadata())

    def seconds(self):
        """How long it took, in all its starts, whichever study it was that needed it first."""
        try:
            with open(self.path + ".seconds") as file:
                return float(file.read())
        except (OSError, ValueError):
            return 0.0


@dataclass(frozen=True)
class CommandTask(Task):
    """A command that makes a file; a later call of it is no work.

    output  that file
    judge   the command whose output it reads, if any: where that becomes another file, this is to be done again
    """
    folder: str
    name: str
    arguments: tuple
    output: str
    cost: float = 0
    judge: Task = None

    def command(self):
        return [str(argument) for argument in self.arguments]

    @property
    def asked(self):
        """Paths by their last names alone: the folder may be moved."""
        names = [os.path.basename(name) if os.path.isabs(name) else name for name in self.command()]
        return dict(arguments=names) | judged_by(self.judge)

    def is_done(self):
        return super().is_done() and os.path.exists(self.output)

    def finish(self, seconds):
        if os.path.exists(self.output):
            write_record(self.path + ".json", dict(asked=self.asked, seconds=seconds, sha256=sha256_file(self.output)))


def judged_by(judge):
    """What a piece asks for beside its own, so that nothing is compared across two classifiers; judge: a `CommandTask`."""
    return dict(classifier=judge.metadata().get("sha256")) if judge else {}


@contextlib.contextmanager
def alone_in(folder, check, say):
    """A block for which nobody else works in a folder; it waits for that. Gives the lock, a file.

    check  called while it waits; may raise
    The processes that are started inherit it: where the study was killed and they were not, its next start waits for
    them, so that no work is done twice.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "a") as lock:
        is_told = False
        while not _is_locked(lock):
            if not is_told:
                say(f"another study is at work in {folder}, or what a killed one has left; waiting for it")
            is_told = True
            check()
            time.sleep(0.2)
        yield lock


def _is_locked(file):
    """Lock a file, if nobody else has; returns whether that was so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RunningTask:
    """A piece that is being worked on by a process of its own, with a file that it inherits."""

    def __init__(self, piece, threads, lock):
        self.piece, self.start = piece, time.monotonic()
        os.makedirs(os.path.dirname(piece.path), exist_ok=True)
        self.log, self.command = piece.path + ".log", [sys.executable, *piece.command()]
        self.process = start_process(self.command, self.log, threads, lock)

    def has_ended(self):
        """Whether it is over; raises `Stopped` where it was told to stop, a `UserError` where it failed."""
        status = self.process.poll()
        if status is None:
            return False
        seconds = self._count_seconds()
        if status == EXIT_RESTARTABLE:
            raise Stopped
        if status:
            raise UserError(f"{self.piece.name} failed with exit status {status}: {shlex.join(self.command)}\n"
                            f"{_tail(self.log)}\n(all of it: {self.log})")
        self.piece.finish(round(seconds, 1))
        if not self.piece.is_done():
            raise UserError(f"{self.piece.name} ended without its result; see {self.log}")
        return True

    def _count_seconds(self):
        """Add the time that this start took to that of those before."""
        path = self.piece.path + ".seconds"
        seconds = self.piece.seconds() + time.monotonic() - self.start
        with open(path, "w") as file:
            file.write(f"{seconds:.1f}")
        return seconds

    def wait(self):
        """Wait for its end, which it has been told."""
        self.process.wait()
        self._count_seconds()


def start_process(command, log, threads, lock):
    """Start a command, in the folder of this project; its output goes to the end of the file `log`."""
    environment = os.environ | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
    with open(log, "a") as output:
        # A session of its own: Ctrl-C is for the study, which then tells its processes to save and end.
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output, pass_fds=[lock.fileno()], start_new_session=True,
                                preexec_fn=_end_with_parent)


PR_SET_PDEATHSIG = 1
LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent():
    """In a new process: be told to stop where the one that started it is killed. Linux alone knows that."""
    if LIBRARY:
        LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tail(path, lines=5):
    with open(path, encoding="utf-8", errors="replace") as file:
        return "\n".join(file.read().splitlines()[-lines:])


def run_tasks(pieces, workers, threads=1, deadline=None, say=print):
    """Do the pieces that are not done, `workers` at once; the largest first, so that they end together.

    threads   of each on the CPU; None: as it likes
    deadline  of time.monotonic(), at which all is saved and given up
    raise     `Stopped` then, and where this process is told to stop; `UserError` where a piece fails
    """
    if all(piece.is_done() for piece in pieces):
        return
    with StopSignals() as signals:
        def check():
            if signals.received or (deadline is not None and time.monotonic() > deadline):
                raise Stopped

        with alone_in(pieces[0].folder, check, say) as lock:
            _run(pieces, workers, threads, lock, check, say)


def _run(pieces, workers, threads, lock, check, say):
    """The same, alone; check: called again and again, raises `Stopped`."""
    waiting = sorted((piece for piece in pieces if not piece.is_done()), key=lambda piece: -piece.cost)
    count, running = len(waiting), []
    try:
        while waiting or running:
            check()
            while waiting and len(running) < workers:
                running.append(RunningTask(waiting.pop(0), threads, lock))
            time.sleep(0.05)
            for job in [job for job in running if job.has_ended()]:
                running.remove(job)
                say(f"[{count - len(waiting) - len(running)}/{count}] {job.piece.name}: "
                    f"{time.monotonic() - job.start:.0f} s")
    finally:  # all are told before any is waited for: each has as long to save as the others
        told = [job for job in running if job.process.poll() is None]
        for job in told:
            job.process.terminate()
        for job in told:
            job.wait()
