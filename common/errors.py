"""Errors that a user can act on, and how a command reports them.

A library function raises `ArgumentError` with the names of its parameters; a command shows them as its flags. What is
no parameter (a file, a package, another process) is a plain `UserError`.
"""
import errno
import os
import re
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from common.console import robust_output

# The same as in requirements.txt; a test compares them.
MINIMUM_VERSIONS = {"torch": "2.6", "torchvision": "0.21", "timm": "1.0.17", "diffusers": "0.32", "accelerate": "1.2",
                    "numpy": "1.26", "pillow": "10.0", "torch-fidelity": "0.4"}


class UserError(Exception):
    """A problem that the user can solve; the message names the flag or file, its value and the remedy.

    Attributes:
        shown (bool): Whether this rank prints the message; the others leave it to the rank that met the problem.
        prefix (str): The rank that met the problem, if not all did.
    """

    prefix = ""

    def __init__(self, message, shown=True):
        super().__init__(message)
        self.shown = shown

    def __str__(self):
        return self.prefix + self.args[0]


class ArgumentError(UserError):
    """A value of a parameter that cannot be used.

        raise ArgumentError("this model has no null class, so it cannot be guided", cfg_scale=2.0)

    A command prints this as "--cfg-scale 2: this model ...". `rename_arguments` serves a command whose flag has
    another name than the parameter.
    """

    def __init__(self, problem, **arguments):
        super().__init__(problem)
        self.arguments = arguments

    def __str__(self):
        flags = (f"--{name.replace('_', '-')}{_format_value(value)}" for name, value in self.arguments.items())
        return f"{self.prefix}{', '.join(flags)}: {self.args[0]}"


def _format_value(value):
    if value is None or value is True:
        return ""
    if isinstance(value, float):
        return f" {value:g}"
    return " " + (" ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


@contextmanager
def rename_arguments(**names):
    """Rename the parameters of an `ArgumentError` from the block: `rename_arguments(cfg_scale="eval_cfg_scale")`."""
    try:
        yield
    except ArgumentError as error:
        error.arguments = {names.get(name, name): value for name, value in error.arguments.items()}
        raise


EXIT_RESTARTABLE = 75  # exit status: stopped by a signal with everything saved; start again (EX_TEMPFAIL of sysexits.h)


class Stopped(Exception):
    """The command was stopped by a signal and has saved its work."""


def run_command(main):
    """Run a command's main function: an error that a user can act on becomes a sentence, with exit status 2."""
    with robust_output():
        try:
            check_versions()
            main()
            sys.stdout.flush()
            if sys.stdout.disk_error:
                raise UserError(f"the work is done, but what was printed did not reach its file "
                                f"({sys.stdout.disk_error.strerror}). Files that were named are complete")
        except Stopped:
            exit_process(EXIT_RESTARTABLE)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            problem = error if isinstance(error, UserError) else explain(error)
            if problem is None:
                raise
            if problem.shown:
                print(f"{os.path.basename(sys.argv[0])}: error: {problem}", file=sys.stderr, flush=True)
            exit_process(2)


def exit_process(status):
    """Exit after leaving the process group, whose threads would otherwise abort the interpreter's shutdown."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ---------------------------------------------------------------- errors of the machine

# Names of packages that differ from what is imported.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "cannot allocate memory",
                  "storage size calculation overflowed", "unable to allocate")
_REMEDIES = {errno.ENOMEM: "Lower the sizes, the batch or the number of processes",
             errno.EAGAIN: "Lower the number of processes, or raise their limit (ulimit -u)",
             errno.EMFILE: "Lower the number of processes, or raise the limit of open files (ulimit -n)",
             errno.ENFILE: "Lower the number of processes", errno.ENOSPC: "Make room on the disk",
             errno.EDQUOT: "Make room in your quota", errno.EROFS: "Name a place that can be written to",
             errno.EIO: "Check the disk, or the terminal"}


def explain(error):
    """Return a `UserError` about a missing package, or about what this machine lacks; None for any other error."""
    if isinstance(error, ImportError):
        return explain_import_error(error)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    may_be_memory = isinstance(error, (RuntimeError, OSError)) and any(map(reason.lower().__contains__, _OUT_OF_MEMORY))
    if isinstance(error, MemoryError) or may_be_memory:
        return UserError(f"there is not enough memory ({reason}). Lower the batch, the image size or the size of the "
                         "model")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return UserError(f"{reason}. {_REMEDIES[error.errno]}")
    return None


def explain_import_error(error):
    """Return a `UserError` about a package that is missing or cannot be used; None for a module of this code."""
    try:
        check_versions()
    except UserError as outdated:
        return outdated
    module = (error.name or "").split(".")[0]
    if any((Path(__file__).parents[1] / name).exists() for name in (f"{module}.py", f"{module}/__init__.py")):
        return None
    package = DISTRIBUTIONS.get(module, module)
    if package and isinstance(error, ModuleNotFoundError) and "." not in error.name:
        return UserError(f"the package {package} is not installed: pip install {package}")
    return UserError(f"{package or 'a package'} cannot be imported ({error}): pip install -r requirements.txt")


def check_versions():
    """Raise a `UserError` for an installed package that is older than `MINIMUM_VERSIONS`."""
    for package, minimum in MINIMUM_VERSIONS.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # its import reports this if anything needs it
        if _version_numbers(installed) < _version_numbers(minimum):
            raise UserError(f"{package} {installed} is installed, {minimum} or later is needed: "
                            "pip install -r requirements.txt")


def _version_numbers(version):
    return [int(number) for number in re.match(r"[\d.]+", version)[0].strip(".").split(".")]
