"""What a latent cache says of itself, and where in its files an image lies."""

import io
import json
import os
import re
from importlib import metadata

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_write, sha256_json

FORMAT = "dit-latents-1"
# What progress.npy says of an image.
MISSING, ENCODED, BAD = 0, 1, 2
# bfloat16, which numpy does not know, lies there as the int16 of the same bits.
DTYPES = {"fp16": (torch.float16, np.dtype("<f2")), "bf16": (torch.bfloat16, np.dtype("<i2")),
          "fp32": (torch.float32, np.dtype("<f4"))}
LARGEST_FILE = 4 << 30  # bytes: ImageNet at 256 pixels takes ten such files
# What two runs must agree on to fill the same cache, and the flags that decide it.
IDENTITY = dict(format=None, vae_sha256="--vae", space="--vae", image_size="--image-size", crop=None,
                orientations="--flip", dtype="--dtype", precision="--precision", count=None, classes=None,
                listing_sha256=None, rows_per_file=None)


def new_manifest(data, data_path, autoencoder, image_size, flips, dtype, precision):
    """What `manifest.json` says before anything is encoded; plain values.

    data       an `LabeledImageDataset`
    codec      a `VAE`
    flips      store the mirror images too
    dtype      "fp16", "bf16" or "fp32": of the stored moments
    precision  in which they were computed
    """
    space = dict(vars(autoencoder.space))
    orientations = 2 if flips else 1
    side = image_size // autoencoder.stride
    return dict(
        format=FORMAT, complete=False, vae=autoencoder.name, vae_sha256=autoencoder.encoder_sha256, space=space,
        image_size=image_size, crop="center, as ADM: halved by box, then bicubic", orientations=orientations,
        latent_size=side, dtype=dtype, precision=precision, count=len(data.labels), classes=data.class_names,
        data_path=data_path, versions={name: metadata.version(name) for name in ("torch", "diffusers", "pillow")},
        rows_per_file=rows_per_file(orientations, autoencoder.channels, side, dtype),
        listing_sha256=sha256_json([data.labels, data.paths]))


def rows_per_file(orientations, channels, side, dtype):
    return max(1, LARGEST_FILE // (orientations * 2 * channels * side * side * DTYPES[dtype][1].itemsize))


def cache_bytes(count, orientations, channels, side, dtype):
    """What the moments and labels of so many images take on disk; the paths and the manifest are small beside it."""
    layout = Layout(dict(count=count, orientations=orientations, space=dict(channels=channels), latent_size=side,
                         dtype=dtype, rows_per_file=rows_per_file(orientations, channels, side, dtype)))
    return sum(layout.sizes) + len(npy_header((count,), np.dtype("<i8"))) + 8 * count


class Layout:
    """Which files a cache consists of, and where in them an image lies; follows from the manifest."""

    def __init__(self, manifest):
        self.count, self.rows_per_file = manifest["count"], manifest["rows_per_file"]
        self.torch_dtype, self.dtype = DTYPES[manifest["dtype"]]
        side = manifest["latent_size"]
        self.row_shape = (manifest["orientations"], 2 * manifest["space"]["channels"], side, side)
        self.row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        self.rows = [min(self.rows_per_file, self.count - first) for first in range(0, self.count, self.rows_per_file)]
        self.names = [f"moments-{number:03d}.npy" for number in range(len(self.rows))]
        self.headers = [npy_header((rows, *self.row_shape), self.dtype) for rows in self.rows]
        self.sizes = [len(header) + rows * self.row_bytes for header, rows in zip(self.headers, self.rows)]

    def pieces(self, first, end):
        """The rows first .. end - 1: (number of the file, offset in bytes there, first row, end row) each."""
        while first < end:
            number, row = divmod(first, self.rows_per_file)
            stop = min(end, (number + 1) * self.rows_per_file)
            yield number, len(self.headers[number]) + row * self.row_bytes, first, stop
            first = stop


def npy_header(shape, dtype):
    """The bytes with which an .npy file of this shape begins."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False,
                                                    shape=shape))
    return file.getvalue()


def read_manifest(folder):
    """The manifest of a cache; a `UserError` where there is none, or a damaged one."""
    path = os.path.join(folder, "manifest.json")
    if not os.path.isfile(path):
        lacks = "holds no manifest.json" if os.path.isdir(folder) else "does not exist"
        raise UserError(f"--features-path {folder} {lacks}: extract_features.py makes a latent cache")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        stated = manifest.pop("manifest_sha256")
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or no manifest of a latent cache ({error})") from None
    if not known:
        raise UserError(f"{path} is of the format {manifest['format']!r}, this code reads {FORMAT!r}")
    if stated != sha256_json(manifest):
        raise UserError(f"{path} was changed since it was written: its own checksum does not fit")
    for name in _implausible(manifest):
        raise UserError(f"{path} says what cannot be: {name} is {str(manifest.get(name))[:60]}")
    return manifest


def _implausible(manifest):
    """Names of the entries that are missing, or of a kind that nothing else should have to expect."""
    kinds = dict(complete=bool, vae=str, vae_sha256=str, space=dict, image_size=int, orientations=int, latent_size=int,
                 dtype=str, count=int, classes=list, rows_per_file=int)
    kinds |= dict(files=dict, bad_images=list) if manifest.get("complete") is True else {}
    yield from (name for name, kind in kinds.items() if type(manifest.get(name)) is not kind)
    yield from (name for name in ("image_size", "latent_size", "count", "rows_per_file") if manifest[name] < 1)
    if manifest["orientations"] not in (1, 2):
        yield "orientations"
    if manifest["dtype"] not in DTYPES:
        yield "dtype"
    for name, file in manifest.get("files", {}).items():
        plain = re.fullmatch(r"moments-\d{3,}\.npy|labels\.npy|paths\.txt", name)
        if not (plain and type(file) is dict and type(file.get("bytes")) is int and type(file.get("sha256")) is str):
            yield "files"
    for entry in manifest.get("bad_images", []):
        if not (type(entry) is list and len(entry) == 2 and type(entry[0]) is int
                and 0 <= entry[0] < manifest["count"]):
            yield "bad_images"


def write_manifest(folder, manifest):
    text = json.dumps(manifest | dict(manifest_sha256=sha256_json(manifest)), indent=1)
    with atomic_write(os.path.join(folder, "manifest.json")) as file:
        file.write(text.encode())
