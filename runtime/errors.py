"""A user's mistake is told in a sentence, not in a traceback."""
import os
import re
import sys
from importlib import metadata

import torch.distributed as dist

# The same as in requirements.txt; a test compares them.
OLDEST = {"torch": "2.6", "torchvision": "0.21", "timm": "1.0.17", "diffusers": "0.32", "accelerate": "1.2",
          "numpy": "1.26", "pillow": "10.0", "torch-fidelity": "0.4"}


class UserError(Exception):
    """Something that the user can put right; the message names the flag or file, its value, and what to do.

    shown  False on the processes that need not repeat what another one prints
    """

    def __init__(self, message, shown=True):
        super().__init__(message)
        self.shown = shown


STOPPED = 75  # exit status: told to stop, all is saved, start me again (EX_TEMPFAIL of sysexits.h)


class Stopped(Exception):
    """The command was told to stop by a signal, and has saved its work."""


def run_command(main):
    """Run a command's main function: a `UserError` becomes its sentence on stderr and exit status 2."""
    try:
        check_versions()
        main()
    except UserError as error:
        if error.shown:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        leave(2)
    except Stopped:
        leave(STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)


def leave(status):
    """Exit; threads of connections that outlive the interpreter would abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def check_versions():
    """Refuse packages that are older than what this code was written for, by name."""
    for package, oldest in OLDEST.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # the import of it will say so, if anything needs it
        if _numbers(found) < _numbers(oldest):
            raise UserError(f"{package} {found} is installed, {oldest} or later is needed: "
                            "pip install -r requirements.txt")


def _numbers(version):
    return [int(number) for number in re.match(r"[\d.]+", version)[0].strip(".").split(".")]
