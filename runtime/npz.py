"""Arrays in `.npz` files, which may be anybody's: nothing is unpickled."""
import zipfile

import numpy as np

from .errors import UserError


def npz_array(path, name):
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
                shape, fortran, dtype = _header(unpacked)
            if dtype.hasobject:
                raise UserError(f"{path}: {name} is no plain array")
            if fortran or entry.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as arrays:
                    return arrays[name]
            _header(file)
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways; each means the same to the user
        raise UserError(f"{path} is damaged, or no .npz with {name} in it ({error})") from None


def npz_names(path):
    """The names of an .npz' arrays. raise: UserError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz ({error})") from None


def _header(file):
    """(shape, is Fortran's order, dtype) of the .npy that begins where `file` is; leaves it behind the header."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](file)
