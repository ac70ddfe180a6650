"""Output to people, which never ends a command: a closed pipe or terminal, a full disk, a character without a code."""
import contextlib
import os
import sys


class RobustStream:
    """A text stream whose failures are ignored. Characters that its encoding lacks are written as escapes."""

    def __init__(self, stream):
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Write text if that is possible, and return its length."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        """Flush the stream if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def close_if_broken(self):
        """Send what could not be written to nowhere, or the interpreter would fail on it when it exits."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def robust_output():
    """Make `sys.stdout` and `sys.stderr` robust during the block."""
    for descriptor in range(3):  # a file that is opened instead of a closed one would receive what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    streams = [RobustStream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.close_if_broken()
