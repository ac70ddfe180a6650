"""Output to people, which never ends a command: a closed pipe or terminal, a full disk, a character without a code."""
import contextlib
import errno
import os
import sys


class RobustStream:
    """A text stream whose failures end nothing. Characters that its encoding lacks are written as escapes.

    Attributes:
        disk_error (OSError): Why output did not reach its file on a full disk, or None. A closed pipe is not an error.
    """

    def __init__(self, stream):
        self._stream, self.disk_error = stream, None
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Write text if that is possible, and return its length."""
        with self._may_fail():
            self._stream.write(text)
        return len(text)

    def flush(self):
        """Flush the stream if that is possible."""
        with self._may_fail():
            self._stream.flush()

    @contextlib.contextmanager
    def _may_fail(self):
        try:
            yield
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                self.disk_error = error

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
