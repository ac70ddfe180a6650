"""Run rows in a worker process: a result is stored when it is there, and no row takes the others with it."""
import contextlib
import gc
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time

import torch

from benchmarks.gpu.row import CheckFailed, NotOnThisDevice
from common.errors import Stopped
from common.provenance import collect_environment
from evaluation.records import read_record, write_record

RESULTS = "results.json"
MIN_LIMIT = 120  # seconds that every row may take, however short its estimate
START_LIMIT = 120  # seconds in which a worker process must start
# Status of a row whose time ran out or whose process ended; a failed row has one of these or of `execute`.
TIMED_OUT, CRASHED = "timed out", "crashed"


class ResultStore:
    """The results of a folder, {name of a row: dict(part, settings, status, ...)}, written after every row."""

    def __init__(self, folder):
        self.path = os.path.join(folder, RESULTS)
        os.makedirs(folder, exist_ok=True)
        self.rows = read_record(self.path).get("rows", {}) if os.path.exists(self.path) else {}

    def add(self, row, result):
        """Store the result of a row."""
        self.rows[row.name] = dict(part=row.part, settings=row.settings) | result
        write_record(self.path, dict(rows=self.rows))

    def missing(self, rows, retry_failed=False):
        """List the rows without a result; with `retry_failed` also those that ended in anything but a result."""
        return [row for row in rows if row.name not in self.rows
                or (retry_failed and self.rows[row.name]["status"] not in ("ok", "skipped"))]


def execute(row, scale):
    """Run a row in this process and return its result; every error is one."""
    start = time.monotonic()
    try:
        result = dict(status="ok", **row.run(scale))
    except NotOnThisDevice as error:
        result = dict(status="skipped", reason=str(error))
    except CheckFailed as error:
        result = dict(status="failed", reason=str(error.args[0]), **dict(*error.args[1:]))
    except (torch.OutOfMemoryError, MemoryError) as error:
        result = dict(status="out of memory", reason=_first_line(error))
    except Exception as error:  # a kernel that is missing, a package that differs: any library's own type
        result = dict(status="error", reason=f"{type(error).__name__}: {_first_line(error)}")
    finally:
        if scale.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        torch._dynamo.reset()
        gc.collect()
        if scale.is_cuda:
            torch.cuda.empty_cache()
    return result | dict(duration=round(time.monotonic() - start, 1))


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def serve(connection, scale):
    """Run the rows that a worker process is sent, until its parent closes the connection or ends."""
    stop_with_parent()
    os.setsid()  # what it starts is stopped with it; Ctrl-C reaches the parent alone
    connection.send(collect_environment(scale.device) | dict(
        cuda=torch.version.cuda, driver=driver_version() if scale.is_cuda else None, cores=os.cpu_count()))
    while True:
        try:
            row = connection.recv()
        except EOFError:
            return
        connection.send(execute(row, scale))


def stop_with_parent():
    """Ask the kernel to kill this process when its parent ends (Linux only): it would go on holding the GPU."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Worker:
    """A process that runs rows, replaced when it ends or is stopped."""

    def __init__(self, scale):
        self.scale, self.process, self.exit_code, self.environment = scale, None, 0, {}

    def run(self, row, limit, should_stop):
        """Return the result of a row, or None if `should_stop()` became true before it.

        Args:
            row (Row): What to run.
            limit (float): Seconds after which it is given up.
            should_stop (callable): () -> bool, called several times a second.
        """
        try:
            if self.process is None:
                self._start()
            end = time.monotonic() + limit
            self.connection.send(row)
            while not self.connection.poll(0.2):
                if should_stop():
                    self.kill()
                    return None
                if time.monotonic() > end:
                    self.kill()
                    return dict(status=TIMED_OUT, reason=f"no result after {limit:.0f} s", duration=round(limit, 1))
            result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=10)
            self.kill()
            return dict(status=CRASHED, reason=f"its process ended: {self._describe_exit()}")
        if self.scale.is_cuda and result["status"] == "error":  # after some errors a CUDA context is of no use
            self.kill()
        return result

    def _describe_exit(self):
        return signal.Signals(-self.exit_code).name if self.exit_code < 0 else f"exit status {self.exit_code}"

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.scale))
        self.process.start()
        other.close()
        if not self.connection.poll(START_LIMIT):
            raise EOFError
        self.environment = self.connection.recv()

    def close(self):
        """Let the process end, if there is one."""
        if self.process is not None:
            self.connection.close()
            self.process.join(timeout=10)
            self.kill()

    def kill(self):
        """End the process and all that it started, if there is one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.process, self.exit_code = None, self.process.exitcode


def run_rows(rows, scale, folder, minutes, should_stop=lambda: False, retry_failed=False, log=print):
    """Run the rows that have no result yet, as many as fit into the time.

    Args:
        rows (list[Row]): In order of value.
        scale (Scale): The device.
        folder (str): Where `RESULTS` is.
        minutes (float): Time limit.
        should_stop (callable): () -> bool: whether a signal asks to stop.
        retry_failed (bool): Run rows again that ended without a result.
        log (callable): Takes lines.

    Returns:
        list[Row]: What is still missing, because it did not fit.

    Raises:
        Stopped: If `should_stop()`; all results so far are stored.
    """
    store, worker, deadline, left = ResultStore(folder), Worker(scale), time.monotonic() + 60 * minutes, []
    missing = store.missing(rows, retry_failed)
    log(f"{len(rows) - len(missing)} of {len(rows)} rows have results in {store.path}")
    try:
        for row in missing:
            remaining = deadline - time.monotonic()
            if row.seconds > remaining:
                left.append(row)
                continue
            result = worker.run(row, min(max(3 * row.seconds, MIN_LIMIT), remaining), should_stop)
            if result is None:
                raise Stopped
            if result["status"] == TIMED_OUT and time.monotonic() >= deadline:
                left.append(row)  # it was not given the time that it may need
                continue
            store.add(row, result | dict(made=worker.environment))
            log(format_line(row.name, store.rows[row.name]))
        worker.close()
    finally:
        worker.kill()
    return left


def format_line(name, result):
    """Return the line of a result."""
    if result["status"] in ("ok", "failed"):
        text = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in result.items()
                         if isinstance(value, (int, float, str)) and key not in ("part", "status", "reason"))
    else:
        text = result["reason"]
    failed = f"FAILED ({result['reason']}) " if result["status"] == "failed" else ""
    status = "" if result["status"] in ("ok", "failed") else result["status"].upper() + ": "
    return f"[{result['part']}] {name}: {failed}{status}{text}"


def driver_version():
    """Return the version of NVIDIA's driver, or None."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                              capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def command_to_continue(argv):
    """Return the command line that continues, from that of this process."""
    return shlex.join(["python", "-m", "benchmarks.gpu", *argv])


