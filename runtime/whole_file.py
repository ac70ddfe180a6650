"""Files that are written whole or not at all."""
import errno
import os
import re
from contextlib import contextmanager

from .errors import UserError


@contextmanager
def whole_file(path, sync=True):
    """A binary file to write to, which appears under its name when the block ends well; otherwise nothing changes.

    sync   have it on the disk before it gets its name, so that not even a power cut leaves half a file
    raise  UserError where it cannot be written
    """
    folder, temporary = os.path.dirname(os.path.abspath(path)), f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(temporary):
            os.remove(temporary)
        # A file of our own, or none: through a link that lies there, something else would be overwritten.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            _sync_folder(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


def linked(path, name):
    """Give the file `path` a second name, in the place of what has it now; False where the disk knows no such thing."""
    temporary = f"{name}.{os.getpid()}.tmp"
    try:
        if os.path.lexists(temporary):
            os.remove(temporary)
        os.link(path, temporary)
        os.replace(temporary, name)
        _sync_folder(os.path.dirname(os.path.abspath(name)))
    except OSError:
        return False
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)
    return True


def _sync_folder(folder):
    """Have the folder's list of names on the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_unfinished(folder):
    """Remove what a kill left of files that were being written; for a folder that nobody writes to just now."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r".+\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))
