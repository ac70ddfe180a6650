"""Files that are written whole or not at all."""
import os
from contextlib import contextmanager

from .errors import UserError


@contextmanager
def whole_file(path, sync=True):
    """A binary file to write to, which appears under its name when the block ends well; otherwise nothing changes.

    sync   have it on the disk before it gets its name, so that not even a power cut leaves half a file
    raise  UserError where it cannot be written
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
