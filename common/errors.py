"""Errors that a user can act on, and how a command reports them.

A library function raises `ArgumentError` with the names of its parameters; a command shows them as its flags. What is
no parameter (a file, a package, another process) is a plain `UserError`.
"""
import os
import re
import sys
from contextlib import contextmanager
from importlib import metadata

import torch.distributed as dist

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
    """Run a command's main function: a `UserError` becomes its message on stderr and exit status 2."""
    try:
        check_versions()
        main()
    except UserError as error:
        if error.shown:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        exit_process(2)
    except Stopped:
        exit_process(EXIT_RESTARTABLE)
    except KeyboardInterrupt:
        sys.exit(130)


def exit_process(status):
    """Exit after leaving the process group, whose threads would otherwise abort the interpreter's shutdown."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


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
