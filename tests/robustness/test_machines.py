"""Machines as they are: closed output, missing signals, packages and locks, disks that cannot be written."""
import builtins
import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from common import distributed, files, resources
from common.cli import parse_args
from common.console import RobustStream, robust_output
from common.errors import ArgumentError, UserError, explain, run_command
from common.files import ProcessLock, atomic_write, check_writable
from common.signals import STOP_SIGNALS, DeferredSignalHandler, StopSignals
from data.loader import PrefetchLoader
from helpers import DIGITS, ROOT, wait_for
from run_files import folder_of, steps_of
from training.cli import build_parser
from training.run_dir import create_run_dir, open_run_dir


class BrokenStream(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "closed terminal"),
                                   OSError(errno.ENOSPC, "full"), ValueError("closed file")])
def test_output_that_fails_does_not_end_the_work(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", BrokenStream(error))
    with robust_output():
        print("a line", flush=True)
        done = True
    assert done


def test_characters_without_a_code_are_written_as_escapes():
    raw = io.BytesIO()
    stream = RobustStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("caf\u00e9 \udcff", file=stream, flush=True)
    assert raw.getvalue() == b"caf\\xe9 \\udcff\n"


def test_missing_output_is_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with robust_output():
        print("nothing", file=sys.stderr)
        assert not sys.stderr.isatty()


def test_work_is_done_with_closed_pipes_and_descriptors(tmp_path):
    """No file gets the number of a closed descriptor, where printed lines would be written into it."""
    code = ("from common.errors import run_command\n"
            "def main():\n"
            f"    file = open({str(tmp_path / 'result')!r}, 'w')\n"
            "    assert file.fileno() > 2\n"
            "    print('a line', flush=True)\n"
            "    file.write('whole')\n"
            "    file.close()\n"
            "run_command(main)\n")
    command = f"'{sys.executable}' -c \"$0\""
    for shell in (f"{command} <&- >&- 2>&-", f"({command}; echo $? >status) | head -c 0"):
        done = subprocess.run(["bash", "-c", shell, code], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "", shell
        assert (tmp_path / "result").read_text() == "whole"
        (tmp_path / "result").unlink()
    assert (tmp_path / "status").read_text() == "0\n"


# ---------------------------------------------------------------- packages, memory, environment

@pytest.mark.parametrize("module, package", [("timm", "timm"), ("PIL", "pillow"), ("torch_fidelity", "torch-fidelity")])
def test_missing_package_is_named_with_its_install_line(module, package):
    problem = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert str(problem).endswith(f"pip install {package}")


def test_missing_package_at_the_first_import_of_a_command(tmp_path):
    """Before any code of the command runs; the status is that of other errors."""
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True,
                          timeout=120, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and "pip install timm" in done.stderr and "Traceback" not in done.stderr


def test_error_in_an_import_of_this_code_keeps_its_traceback():
    assert explain(ModuleNotFoundError("No module named 'training.nowhere'", name="training.nowhere")) is None


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 1 GB"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
                                   OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EMFILE, "Too many"),
                                   OSError(errno.EAGAIN, "unavailable"), OSError(errno.EROFS, "Read-only")])
def test_what_a_machine_lacks_is_told_in_a_sentence(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_control_other_errors_are_raised():
    def main():
        raise RuntimeError("a mistake in the code")
    with pytest.raises(RuntimeError, match="a mistake"):
        run_command(main)


@pytest.mark.parametrize("variables", [dict(WORLD_SIZE="8"), dict(WORLD_SIZE="two"), dict(WORLD_SIZE="2", RANK="0")])
def test_stray_variables_of_a_launcher_are_named(monkeypatch, variables):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset WORLD_SIZE"):
        distributed.init()


def test_training_without_tensorboard(command, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, out, err = command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    assert status == 0, err
    assert "WARNING" in out and "tensorboard" in out and steps_of(tmp_path) == [1]


# ---------------------------------------------------------------- signals

def test_signals_that_a_platform_lacks(monkeypatch):
    monkeypatch.delattr(signal, "SIGCHLD")
    with DeferredSignalHandler.install("SIGCHLD"):
        pass
    assert PrefetchLoader  # imports without it


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_ends_of_terminals_and_of_cpu_time_stop_a_run_but_ignored_signals_do_not():
    """SIGHUP is ignored under nohup, and stays so."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGXCPU)
            assert signals.received == "SIGXCPU"
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU} <= set(STOP_SIGNALS)


def test_signals_are_left_alone_outside_the_main_thread():
    problems = []

    def work():
        try:
            with StopSignals():
                pass
        except ValueError as error:
            problems.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


# ---------------------------------------------------------------- files and folders

def test_files_are_written_where_folders_cannot_be_opened_or_synced(tmp_path, monkeypatch):
    real_open, real_fsync = os.open, os.fsync

    def open_files_only(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_open(path, flags, *args, **kwargs)

    def fsync(descriptor):
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "open", open_files_only)
    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(str(tmp_path / "file")) as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    monkeypatch.setattr(os, "fsync", real_fsync)


def test_disk_errors_of_fsync_are_raised(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "broken disk")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="broken disk"), atomic_write(str(tmp_path / "file")) as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(str(tmp_path / "new" / "folders" / "x.png"), output="x.png")
    check_writable(str(tmp_path / "new" / "folders"), is_folder=True, output="x")
    assert os.listdir(tmp_path) == ["file"]  # nothing is left
    for path, is_folder in [(tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "x", False),
                            (tmp_path / ("long" * 100), False), (Path("/proc/nowhere/x"), False)]:
        with pytest.raises(ArgumentError) as caught:
            check_writable(str(path), is_folder, output=str(path))
        assert "output" in caught.value.arguments


def test_results_folder_is_checked_before_the_data(command, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = command("train", "--data-path", tmp_path / "nowhere", "--results-dir", tmp_path / "file" / "runs")
    assert status == 2 and "--results-dir" in err


def test_home_folder_of_an_unknown_user_is_refused(command):
    status, _, err = command("train", *DIGITS, "--results-dir=~nobody-has-this-name/runs")
    assert status == 2 and "--results-dir" in err and not os.path.exists("~nobody-has-this-name")


@pytest.mark.parametrize("line", [["--results-dir", "~/runs"], ["--results-dir=~/runs"]])
def test_tilde_is_the_home_folder(monkeypatch, line):
    monkeypatch.setenv("HOME", "/somebody")
    flags, _ = parse_args(build_parser(), argv=["--data-path", "digits", *line])
    assert flags.results_dir == "/somebody/runs"


@pytest.mark.parametrize("line", [["--results-dir", ""], ["--results-dir="], ["--resume", " "], ["--eval-reference="]])
def test_empty_values_are_mistakes(capsys, line):
    with pytest.raises(SystemExit):
        parse_args(build_parser(), argv=["--data-path", "digits", *line])
    assert line[0].rstrip("=") in capsys.readouterr().err


def test_sampling_steps_have_one_spelling():
    line = ["--data-path", "digits", "--eval-sampling-steps"]
    assert [parse_args(build_parser(), argv=[*line, text])[0].eval_sampling_steps
            for text in ("ddim50", "DDIM050", "050")] == ["ddim50", "ddim50", 50]


# ---------------------------------------------------------------- two at once, runs on read-only disks

def test_second_run_in_a_folder_is_refused_and_touches_nothing(children, command, tmp_path):
    flags = [*DIGITS, "--log-every", 1, "--results-dir", tmp_path]
    command("train", *flags, "--max-steps", 1)
    first, = children.start("train", *flags, "--max-steps", 10**9, "--ckpt-every", 0, "--resume", "auto")
    wait_for(lambda: "Train Loss" in first.log.read_text())
    leftover = folder_of(tmp_path) / "checkpoints" / "0000100.pt.1.tmp"
    leftover.write_text("being written")
    out = children.run("train", *flags, "--max-steps", 2, "--resume", "auto", status=2)
    assert "another process trains in" in out and leftover.exists()
    first.kill()
    first.join()
    children.run("train", *flags, "--max-steps", 2, "--resume", "auto")
    assert steps_of(tmp_path) == [1, 2] and not leftover.exists()


def test_disks_without_locks_give_no_protection_and_no_error(tmp_path, monkeypatch):
    import fcntl

    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert ProcessLock(str(tmp_path / "file")).is_held
    assert ProcessLock(str(tmp_path / "nowhere" / "file")).is_held


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    """The number that a run chose may be taken before it makes its folder."""
    real, calls = os.makedirs, []

    def slow(path, *args, **kwargs):
        if not calls:
            calls.append(path)
            real(path)  # the other run
        real(path, *args, **kwargs)
    monkeypatch.setattr(os, "makedirs", slow)
    assert create_run_dir(str(tmp_path), "DiT-S/2").endswith("001-DiT-S-2")


@pytest.mark.parametrize("resume", ["checkpoint", "folder"])
def test_run_on_a_read_only_disk_continues_in_another_folder(command, tmp_path, monkeypatch, resume):
    command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path / "old")
    old = folder_of(tmp_path / "old")

    def probe(path, is_folder):
        return OSError(errno.EROFS, "read-only") if str(old) in path else files.probe_writing(path, is_folder)

    monkeypatch.setattr("training.run_dir.probe_writing", probe)
    path = old if resume == "folder" else old / "checkpoints" / "0000001.pt"
    run_dir, checkpoint, warnings = open_run_dir(str(tmp_path / "new"), "DiT-S/2", str(path))
    assert run_dir == str(tmp_path / "new" / "000-DiT-S-2") and checkpoint.startswith(str(old)) and len(warnings) == 1


# ---------------------------------------------------------------- what a machine has

def write_group(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_free_memory_of_control_groups(tmp_path):
    """The group and its parents count; what caches files is free; no limit is no bound."""
    process = tmp_path / "cgroup"
    process.write_text("0::/job/step\n")
    write_group(tmp_path / "mount" / "job", memory__max="1000\n", memory__current="700\n", memory__stat="file 50\n")
    write_group(tmp_path / "mount" / "job" / "step", memory__max="max\n", memory__current="700\n")
    assert resources.cgroup_memory(process, tmp_path / "mount") == [350]
    process.write_text("5:memory:/job\n4:cpu:/job\n")
    write_group(tmp_path / "mount" / "memory" / "job", memory__limit_in_bytes="400\n", memory__usage_in_bytes="100\n")
    assert resources.cgroup_memory(process, tmp_path / "mount") == [300]
    assert resources.cgroup_memory(tmp_path / "nowhere", tmp_path) == []


def test_more_workers_than_the_machine_can_hold_are_refused(command, tmp_path):
    status, _, err = command("train", *DIGITS, "--num-workers", 10**6, "--results-dir", tmp_path / "runs")
    assert status == 2 and "--num-workers 1000000:" in err and not (tmp_path / "runs").exists()


def test_workers_are_compared_with_the_limit_of_open_files(monkeypatch):
    monkeypatch.setattr(resources.resource, "getrlimit", lambda which: (
        (64, 64) if which == resources.resource.RLIMIT_NOFILE else (-1, -1)))
    resources.check_num_workers(8)
    with pytest.raises(ArgumentError, match="open files"):
        resources.check_num_workers(17)


@pytest.mark.parametrize("check, needed", [(resources.check_memory, 10**18), (resources.check_disk, 10**18)])
def test_needs_beyond_the_machine_name_the_parameter(tmp_path, check, needed):
    where = [tmp_path] if check is resources.check_disk else []
    check(1, *where, batch_size=3)
    with pytest.raises(ArgumentError) as caught:
        check(needed, *where, batch_size=3)
    assert caught.value.arguments == dict(batch_size=3)


def test_output_that_a_full_disk_loses_is_an_error_after_the_work(tmp_path):
    """/dev/full is always full."""
    code = "from common.errors import run_command; run_command(lambda: (print('result'), open('done', 'w').close()))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
                                text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert result.returncode == 2 and "No space left" in result.stderr and (tmp_path / "done").exists()
