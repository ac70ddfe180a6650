"""What a command does before its other imports, so that a package that cannot be imported is told in a sentence.

Commands import this module before all others; pyproject.toml orders it first.
"""
import sys


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
