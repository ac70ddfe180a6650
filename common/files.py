"""Files: atomic writes, SHA-256, .npz arrays of untrusted origin, and writing in the background."""
import errno
import hashlib
import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from common.errors import UserError


class BackgroundWriter:
    """A block in which pieces of work, such as writing files, are done by another thread: one at a time, in order.

    An error of a piece is raised where the next one is handed over, or at the end of the block, unless the
    block itself ends by an error.
    """

    def __enter__(self):
        self.thread, self.piece = ThreadPoolExecutor(1), None
        return self

    def __exit__(self, kind, error, traceback):
        self.thread.shutdown()
        if error is None:
            self._finish()

    def do(self, function, *args):
        """Wait for the piece before, then begin this one."""
        self._finish()
        self.piece = self.thread.submit(function, *args)

    def _finish(self):
        piece, self.piece = self.piece, None
        if piece:
            piece.result()


def sha256_file(path, block=1 << 22, on_block=None):
    """SHA-256 of a file, in hexadecimal digits; `on_block` is called with the bytes of each block that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(block):
            digest.update(data)
            if on_block:
                on_block(len(data))
    return digest.hexdigest()


def sha256_weights(*modules):
    """SHA-256 of the names and values of the modules' weights and buffers, wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def sha256_json(value):
    """SHA-256 of a value of JSON, whatever the order of its dictionaries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def format_bytes(number):
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def read_npz_array(path, name):
    """An array of an .npz. Where it is not compressed, as a memory map: nothing is read before it is used.

    raise  UserError for a damaged file, one without this array, and an array of Python objects
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entry = archive.getinfo(f"{name}.npy")
            file.seek(entry.header_offset + 26)  # behind the lengths of the local header's name and extra field
            lengths = np.frombuffer(file.read(4), dtype="<u2")
            file.seek(entry.header_offset + 30 + int(lengths.sum()))
            with archive.open(entry) as unpacked:
                shape, fortran, dtype = _read_npy_header(unpacked)
            if dtype.hasobject:
                raise UserError(f"{path}: {name} is no plain array")
            if fortran or entry.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as arrays:
                    return arrays[name]
            _read_npy_header(file)
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways; each means the same to the user
        raise UserError(f"{path} is damaged, or no .npz with {name} in it ({error})") from None


def list_npz_arrays(path):
    """The names of an .npz' arrays. raise: UserError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error})") from None


def _read_npy_header(file):
    """(shape, is Fortran's order, dtype) of the .npy that begins where `file` is; leaves it behind the header."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](file)


@contextmanager
def atomic_write(path, sync=True):
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
            _fsync_dir(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


def replace_with_hard_link(path, name):
    """Give the file `path` a second name, in the place of what has it now; False where the disk knows no such thing."""
    temporary = f"{name}.{os.getpid()}.tmp"
    try:
        if os.path.lexists(temporary):
            os.remove(temporary)
        os.link(path, temporary)
        os.replace(temporary, name)
        _fsync_dir(os.path.dirname(os.path.abspath(name)))
    except OSError:
        return False
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)
    return True


def _fsync_dir(folder):
    """Have the folder's list of names on the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_temporary_files(folder):
    """Remove what a kill left of files that were being written; for a folder that nobody writes to just now."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r".+\.\d+\.tmp", name):
            os.remove(os.path.join(folder, name))
