"""A user's mistake is told in a sentence, not in a traceback."""
import os
import sys


class UserError(Exception):
    """Something that the user can put right; the message names the flag or file, its value, and what to do.

    shown  False on the processes that need not repeat what another one prints
    """

    def __init__(self, message, shown=True):
        super().__init__(message)
        self.shown = shown


def run_command(main):
    """Run a command's main function: a `UserError` becomes its sentence on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        if error.shown:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
