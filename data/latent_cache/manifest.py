"""The manifest of a latent cache, and the layout of its files, which follows from it."""
import hashlib
import io
import json
import os
import re
from importlib import metadata

import numpy as np
import torch

from common.errors import ArgumentError, UserError
from common.files import atomic_write, sha256_json

FORMAT = "dit-latents-1"
# States of an image in progress.npy.
MISSING, ENCODED, CORRUPT = 0, 1, 2
# Stored types. bfloat16, which numpy does not have, is stored as the int16 of the same bits.
DTYPES = {
    "fp16": (torch.float16, np.dtype("<f2")),
    "bf16": (torch.bfloat16, np.dtype("<i2")),
    "fp32": (torch.float32, np.dtype("<f4")),
}
MAX_FILE_BYTES = 4 << 30  # ImageNet at 256 pixels takes ten such files
# Fields on which two runs must agree to fill the same cache, and the parameters that decide them.
IDENTITY = dict(format=None, vae_sha256="vae", space="vae", image_size="image_size", crop=None, orientations="flip",
                dtype="dtype", precision="precision", count="data_path", classes="data_path",
                listing_sha256="data_path", rows_per_file=None)
HASH_BLOCK = 1 << 14  # number of paths that are held at once while they are hashed


def new_manifest(dataset, data_path, autoencoder, image_size, flips, dtype, precision):
    """Build the manifest of a cache before anything is encoded.

    `flips` is whether mirror images are stored too, `dtype` the key of `DTYPES` of the stored moments, `precision` that
    of the encoder.
    """
    orientations = 2 if flips else 1
    latent_size = image_size // autoencoder.stride
    return dict(
        format=FORMAT, complete=False, vae=autoencoder.name, vae_sha256=autoencoder.encoder_sha256,
        space=dict(vars(autoencoder.latent_scaling)), image_size=image_size,
        crop="center, as ADM: halved by box, then bicubic", orientations=orientations, latent_size=latent_size,
        dtype=dtype, precision=precision, count=len(dataset.labels), classes=dataset.class_names, data_path=data_path,
        versions={name: metadata.version(name) for name in ("torch", "diffusers", "pillow")},
        rows_per_file=count_rows_per_file(orientations, autoencoder.channels, latent_size, dtype),
        listing_sha256=sha256_listing(dataset.labels, dataset.paths))


def sha256_listing(labels, paths):
    """Return the SHA-256 of the JSON text [labels, paths], without holding the text or all paths in memory."""
    digest = hashlib.sha256()
    for opening, values in (("[[", labels), ("], [", paths)):
        digest.update(opening.encode())
        for start in range(0, len(values), HASH_BLOCK):
            block = [values[index] for index in range(start, min(start + HASH_BLOCK, len(values)))]
            digest.update(((", " if start else "") + json.dumps(block, default=int)[1:-1]).encode())
    digest.update(b"]]")
    return digest.hexdigest()


def count_rows_per_file(orientations, channels, latent_size, dtype):
    """Return how many images fit into a file of `MAX_FILE_BYTES`."""
    return max(1, MAX_FILE_BYTES // (orientations * 2 * channels * latent_size**2 * DTYPES[dtype][1].itemsize))


def cache_bytes(count, orientations, channels, latent_size, dtype):
    """Return the bytes on disk of the moments and labels of `count` images; the other files are small."""
    layout = Layout(dict(count=count, orientations=orientations, space=dict(channels=channels),
                         latent_size=latent_size, dtype=dtype,
                         rows_per_file=count_rows_per_file(orientations, channels, latent_size, dtype)))
    return sum(layout.sizes) + len(npy_header((count,), np.dtype("<i8"))) + 8 * count


class Layout:
    """The moments files of a cache, and where in them an image lies.

    Attributes:
        row_shape (tuple): Shape of an image's moments, (orientations, 2C, h, w).
        rows, names, headers, sizes (list): Of each file: number of images, name, .npy header, bytes.
    """

    def __init__(self, manifest):
        self.count, self.rows_per_file = manifest["count"], manifest["rows_per_file"]
        self.torch_dtype, self.dtype = DTYPES[manifest["dtype"]]
        latent_size = manifest["latent_size"]
        self.row_shape = (manifest["orientations"], 2 * manifest["space"]["channels"], latent_size, latent_size)
        self.row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        self.rows = [min(self.rows_per_file, self.count - start) for start in range(0, self.count, self.rows_per_file)]
        self.names = [f"moments-{number:03d}.npy" for number in range(len(self.rows))]
        self.headers = [npy_header((rows, *self.row_shape), self.dtype) for rows in self.rows]
        self.sizes = [len(header) + rows * self.row_bytes for header, rows in zip(self.headers, self.rows)]

    def locate(self, index, orientation=0):
        """Return (number of the file, offset in bytes) of the moments of an image."""
        number, row = divmod(index, self.rows_per_file)
        offset = len(self.headers[number]) + row * self.row_bytes
        return number, offset + orientation * (self.row_bytes // self.row_shape[0])

    def split_by_file(self, start, end):
        """Split the images start .. end - 1 into ranges (start, end) that lie in one file each."""
        while start < end:
            stop = min(end, (start // self.rows_per_file + 1) * self.rows_per_file)
            yield start, stop
            start = stop


def npy_header(shape, dtype):
    """Return the bytes with which an .npy file of this shape begins."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False,
                                                    shape=shape))
    return file.getvalue()


def begins_with(path, header):
    """Return whether a file begins with the bytes of a header."""
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def read_manifest(features_path):
    """Read the manifest of a cache; raises a `UserError` if there is none, or it is damaged."""
    path = os.path.join(features_path, "manifest.json")
    if not os.path.isfile(path):
        problem = "it holds no manifest.json" if os.path.isdir(features_path) else "there is no such folder"
        raise ArgumentError(f"{problem}. Make a latent cache with extract_features.py", features_path=features_path)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        stored_sha256 = manifest.pop("manifest_sha256")
        is_known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or is not the manifest of a latent cache ({error})") from None
    if not is_known:
        raise UserError(f"{path} has the format {manifest['format']!r}, this code reads {FORMAT!r}")
    if stored_sha256 != sha256_json(manifest):
        raise UserError(f"{path} was changed since it was written: its checksum does not match")
    for name in _implausible_fields(manifest):
        raise UserError(f"{path} is damaged: {name} cannot be {str(manifest.get(name))[:60]}")
    return manifest


def _implausible_fields(manifest):
    """Yield the names of fields that are missing, or of a type or value that the code cannot work with."""
    types = dict(complete=bool, vae=str, vae_sha256=str, space=dict, image_size=int, orientations=int, latent_size=int,
                 dtype=str, count=int, classes=list, rows_per_file=int)
    if manifest.get("complete") is True:
        types |= dict(files=dict, bad_images=list)
    yield from (name for name, type_ in types.items() if type(manifest.get(name)) is not type_)
    yield from (name for name in ("image_size", "latent_size", "count", "rows_per_file") if manifest[name] < 1)
    if manifest["orientations"] not in (1, 2):
        yield "orientations"
    if manifest["dtype"] not in DTYPES:
        yield "dtype"
    if set(manifest["space"]) != {"channels", "stride", "scale", "shift", "image_channels"}:
        yield "space"
    for name, file in manifest.get("files", {}).items():
        is_known = re.fullmatch(r"moments-\d{3,}\.npy|labels\.npy|paths\.txt", name)
        if not (is_known and type(file) is dict and type(file.get("bytes")) is int and type(file.get("sha256")) is str):
            yield "files"
    for entry in manifest.get("bad_images", []):
        if not (type(entry) is list and len(entry) == 2 and type(entry[0]) is int
                and 0 <= entry[0] < manifest["count"]):
            yield "bad_images"


def write_manifest(folder, manifest):
    """Write a manifest with its checksum."""
    text = json.dumps(manifest | dict(manifest_sha256=sha256_json(manifest)), indent=1)
    with atomic_write(os.path.join(folder, "manifest.json")) as file:
        file.write(text.encode())
