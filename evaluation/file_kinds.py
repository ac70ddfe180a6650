"""What a file is that was named as images or as statistics, and how to convert it. Nothing in it is executed."""
import pickletools
import zipfile

import numpy as np

from common.checkpoint_io import detect_format
from common.errors import UserError

IMAGES = "an .npz with arr_0, uint8, shape (N, H, W, 3), or a folder"
WANTED_IMAGES = f"Images are {IMAGES}."
WANTED_REFERENCE = f"A reference is an .npz with mu, shape (D,), and sigma, shape (D, D), or images: {IMAGES}."

# Formats that `detect_format` recognizes, and what to do.
FORMATS = {
    "torch": ("a PyTorch file", "Samples of a checkpoint are scored by `evaluate.py score CKPT --reference REF`"),
    "safetensors": ("a checkpoint", "Its samples are scored by `evaluate.py score CKPT --reference REF`"),
    "image": ("one image", "Name its folder"), "empty": ("empty", "Copy or download it again"),
    "zip": ("a zip archive", "Unpack it"), "gzip": ("compressed", "Unpack it"), "zstd": ("compressed", "Unpack it"),
    "hdf5": ("an HDF5 file", "Convert it with h5py and numpy.savez"), "json": ("a JSON text", "Name a data file"),
    "html": ("a web page", "Download the file itself"),
    "git-lfs": ("a pointer of Git LFS to the file", "Fetch it by `git lfs pull`")}


class Purpose:
    """What a file is opened for.

    Args:
        is_reference (bool): As a reference, which may be statistics, or as images only.
        space (dict): Metadata of the feature space of a reference. Other tools have statistics of Inception only.
    """

    def __init__(self, is_reference=False, space=None):
        self.arrays = ("mu", "arr_0") if is_reference else ("arr_0",)
        self.wanted = WANTED_REFERENCE if is_reference else WANTED_IMAGES
        self.takes_statistics = is_reference and "spatial" in space
        self.otherwise = "Convert it with numpy.savez"
        if is_reference and not self.takes_statistics:
            self.otherwise = (f"Statistics of other tools are of Inception features: for {space['space']}, measure the "
                              "images with `evaluate.py reference`")


def list_arrays(path, purpose):
    """Return {name: (shape, dtype)} of the arrays of an .npz that has what a `Purpose` needs.

    Raises:
        UserError: For any other file: what it is, what is needed, and how to convert it.
    """
    arrays = _read_headers(path)
    if arrays is None:
        kind, remedy = _describe(path, purpose)
        raise UserError(f"{path} is {kind}. {purpose.wanted} {remedy}")
    held = ", ".join(f"{name} {shape}" for name, (shape, _) in list(arrays.items())[:6]) or "nothing"
    if not any(name in arrays for name in purpose.arrays):
        remedy = _conversion(arrays, purpose, f"numpy.load({path!r})")
        if "mu" in arrays:
            remedy = "Statistics are for --reference"
        raise UserError(f"{path} has no {' and no '.join(purpose.arrays)}: it holds {held}. {purpose.wanted} {remedy}")
    if "mu" in purpose.arrays and "mu" in arrays and "sigma" not in arrays:
        raise UserError(f"{path} has mu, but no sigma: it holds {held}. {purpose.wanted}")
    return arrays


def _read_headers(path):
    """Return {name: (shape, dtype)} of the arrays of an .npz, (None, None) if unreadable; None of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            if archive.namelist() and not names:
                return None
            arrays = {}
            for name in names:
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = _read_header(file)
            return arrays
    except zipfile.BadZipFile:
        return None
    except (OSError, NotImplementedError, RuntimeError) as error:  # the latter two: encrypted, or packed by others
        raise UserError(f"{path} cannot be read ({error})") from None


def _read_header(file):
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](file)
        return shape, dtype
    except Exception:  # a damaged file fails in many ways; reading the array reports it
        return None, None


def _describe(path, purpose):
    """Return what a file is that is no .npz, and what to do."""
    kind = detect_format(path)
    if kind in FORMATS:
        return FORMATS[kind]
    with open(path, "rb") as file:
        if kind == "npy":
            shape, dtype = _read_header(file)
            if dtype is not None and not dtype.hasobject:
                remedy = _conversion({None: (shape, dtype)}, purpose, f"numpy.load({path!r})")
                return f"a NumPy array, {dtype} of shape {shape}", remedy
            source = f"numpy.load({path!r}, allow_pickle=True).item()"
            return "a .npy of Python objects", _pickle_conversion(file, purpose, source)
        if kind == "pickle":
            return "a Python pickle", _pickle_conversion(file, purpose, f"pickle.load(open({path!r}, 'rb'))")
        if file.read(2) == b"PK":
            return "damaged: the beginning of an .npz or another archive", "Copy or download it again"
    return "no file of a kind that is known here", purpose.otherwise


def _conversion(arrays, purpose, source):
    """Return a line of Python that writes what is needed from arrays {name: (shape, dtype)}, if some of them fit."""
    code = {name: "d" if name is None else f"d[{name!r}]" for name in arrays}
    for name, (shape, dtype) in arrays.items():
        if dtype == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[3]):
            transpose = "" if shape[3] == 3 else ".transpose(0, 2, 3, 1)"
            return f"Convert it: d = {source}; numpy.savez('images.npz', arr_0={code[name]}{transpose})"
    pairs = [(code[mean], code[covariance]) for mean, (shape, _) in arrays.items()
             for covariance, (square, _) in arrays.items() if shape and len(shape) == 1 and square == shape * 2]
    if purpose.takes_statistics and len(pairs) == 1:
        mean, covariance = pairs[0]
        return f"Convert it: d = {source}; numpy.savez('reference.npz', mu={mean}, sigma={covariance})"
    return purpose.otherwise


def _pickle_conversion(file, purpose, source):
    """Return a line of Python that writes what is needed from the pickle in an open file, judged by its texts."""
    texts = set()
    try:
        texts.update(argument for _, argument, _ in pickletools.genops(file) if isinstance(argument, str))
    except Exception:
        return "It is damaged: fetch it again"
    if not purpose.takes_statistics or not {"mu", "sigma"} <= texts:
        return purpose.otherwise
    source += "['fid']" if "fid" in texts else ""
    return ("Convert it, if you trust it, since loading it can run code: "
            f"d = {source}; numpy.savez('reference.npz', mu=d['mu'], sigma=d['sigma'])")
