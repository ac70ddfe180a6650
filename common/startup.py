"""What a command does before its other imports; commands import this module first, as pyproject.toml orders it.

A package that cannot be imported is named in a sentence, and threads of GNU's OpenMP spin for a bounded time (others
ignore the variable).
"""
import os
import sys

# OpenMP reads this once, when torch is imported. By default a thread spins so long for one whose core another
# program uses that training is many times slower (docs/performance.md).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "300"


def report_import_error(error_type, error, traceback):
    """Print what can be done about an error of an import and exit with status 2; show any other error as usual."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if isinstance(error, ImportError):
        from common.errors import explain_import_error

        if problem := explain_import_error(error):
            print(f"{sys.argv[0]}: error: {problem}", file=sys.stderr)
            sys.exit(2)
    sys.__excepthook__(error_type, error, traceback)


sys.excepthook = report_import_error
