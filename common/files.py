"""Files: writing atomically or in the background, SHA-256, and .npz arrays of untrusted origin."""
import contextlib
import errno
import hashlib
import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common.errors import ArgumentError, UserError


class BackgroundWriter:
    """Context in which a thread does pieces of work, such as writing files: one at a time, in order.

    An error of a piece is raised when the next one is submitted, or at the end of the block, unless the block itself
    ends by an error.
    """

    def __enter__(self):
        self._thread, self._pending = ThreadPoolExecutor(1), None
        return self

    def __exit__(self, error_type, error, traceback):
        self._thread.shutdown()
        if error is None:
            self._finish()

    def submit(self, function, *args):
        """Wait for the previous piece, then begin this one."""
        self._finish()
        self._pending = self._thread.submit(function, *args)

    def _finish(self):
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def sha256_file(path, block=1 << 22, on_block=None):
    """Return the SHA-256 of a file in hexadecimal; `on_block` is called with the size of each block that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(block):
            digest.update(data)
            if on_block:
                on_block(len(data))
    return digest.hexdigest()


def sha256_weights(*modules):
    """Return the SHA-256 of the names and values of the modules' weights and buffers, on any device."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def sha256_json(value):
    """Return the SHA-256 of a JSON value, independent of the order of its dictionaries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def format_bytes(number):
    """Format a number of bytes as MB, GB or TB."""
    if number >= 1e13:
        return f"{number / 1e12:,.1f} TB"
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


class PickledArrayError(UserError):
    """An array of Python objects, which only unpickling could read."""


def read_npz_array(path, name):
    """Read an array of an .npz of any origin, after comparing it with its CRC; an uncompressed one is memory-mapped.

    Raises:
        UserError: For a damaged file, or one without this array; `PickledArrayError` for an array of Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entry = archive.getinfo(f"{name}.npy")
            file.seek(entry.header_offset + 26)  # the lengths of the local header's name and extra field
            lengths = np.frombuffer(file.read(4), dtype="<u2")
            file.seek(entry.header_offset + 30 + int(lengths.sum()))
            with archive.open(entry) as unpacked:
                shape, is_fortran, dtype = _read_npy_header(unpacked)
            _verify_npz_entry(path, archive, entry)
            if dtype.hasobject:
                raise PickledArrayError(f"{path}: {name} is not a plain array")
            if is_fortran or entry.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as arrays:
                    return arrays[name]
            _read_npy_header(file)
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} is damaged, or is not an .npz with {name} in it ({error})") from None


_verified = set()  # large arrays that this process has compared with their CRC


def _verify_npz_entry(path, archive, entry):
    """Raise a `UserError` if an array does not have its CRC. A large one is read by rank 0 only, and once."""
    status = os.stat(path)
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size, entry.filename)
    is_large = entry.file_size > 1 << 26
    if is_large and (key in _verified or os.environ.get("RANK", "0") != "0"):
        return
    try:
        with archive.open(entry) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        raise UserError(f"{path} is damaged: {entry.filename} in it does not have its checksum") from None
    if is_large:
        _verified.add(key)


def _read_npy_header(file):
    """Read (shape, is Fortran order, dtype) of the .npy at the position of `file`, which ends up after the header."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](file)


@contextlib.contextmanager
def atomic_write(path, sync=True):
    """Yield a binary file that appears under its name when the block ends without an error; otherwise nothing changes.

    Its folder is made if needed. With `sync` it is on the disk before it gets its name, so that a power cut leaves no
    partial file. Raises a `UserError` if it cannot be written.
    """
    folder, temporary = os.path.dirname(os.path.abspath(path)), f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        _remove(temporary)
        # O_EXCL: never through a link that someone put there.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            if sync:
                file.flush()
                _fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            _fsync_dir(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        _remove(temporary)


def _remove(path):
    if os.path.lexists(path):
        os.remove(path)


def replace_with_hard_link(path, name):
    """Give the file `path` a second name, replacing what has it; return False if the disk has no hard links."""
    temporary = f"{name}.{os.getpid()}.tmp"
    try:
        _remove(temporary)
        os.link(path, temporary)
        os.replace(temporary, name)
        _fsync_dir(os.path.dirname(os.path.abspath(name)))
        return True
    except OSError:
        return False
    finally:
        _remove(temporary)


def _fsync(descriptor):
    """Put a file on the disk, if its file system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # others say that there is no such operation
            raise


def _fsync_dir(folder):
    """Put the list of names in a folder on the disk, if its file system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that opens files only
        return
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path, is_folder=False, **argument):
    """Raise an `ArgumentError` if `path` cannot be written, before the work whose result it is to hold.

        check_writable(flags.output, output=flags.output)

    Args:
        path (str): A file, or with `is_folder` a folder for new files. What is missing of its folders can be made.
        is_folder (bool): Whether it is a folder.
        **argument: The parameter that named it, for the error.
    """
    if os.path.isdir(path) and not is_folder:
        raise ArgumentError("this is a folder. Name a file in it", **argument)
    if error := probe_writing(path, is_folder):
        raise ArgumentError(f"cannot be written to ({error.strerror}: {error.filename}). Name another place",
                            **argument)


def probe_writing(path, is_folder=False):
    """Return the `OSError` of writing a file `path`, or a file in the folder `path`; None if that is possible."""
    path = os.path.abspath(path)
    folder, name = (path, "new") if os.path.isdir(path) else os.path.split(path)
    while not os.path.lexists(folder):
        folder, name = os.path.split(folder)
    probe = os.path.join(folder, f"{name}.{os.urandom(6).hex()}.tmp")  # ranks of several nodes share the folder
    try:
        if is_folder and os.path.lexists(path) and not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with contextlib.suppress(FileNotFoundError):  # another rank removes temporary files at its start
            os.unlink(probe)
    except OSError as error:
        error.filename = folder
        return error
    return None


class ProcessLock:
    """A lock on a file, until this process ends or the object is deleted; processes that are forked do not share it.

    A disk or a system without locks gives none, and no protection.

    Attributes:
        is_held (bool): False if another process has the lock.
    """

    def __init__(self, path):
        self.is_held, self._descriptor = True, None
        try:
            import fcntl
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            self.is_held = self._descriptor is None or error.errno not in (errno.EACCES, errno.EAGAIN)

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


def remove_temporary_files(folder):
    """Remove partial files that a kill left, from a folder that no process writes to."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r".+\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))
