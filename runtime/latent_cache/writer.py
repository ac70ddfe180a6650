"""Filling a latent cache, by any number of processes, over any number of restarts."""
import os
import shutil

import numpy as np
import torch

from ..errors import UserError
from ..ranges import missing_ranges
from ..whole_file import whole_file
from .manifest import BAD, ENCODED, IDENTITY, MISSING, Layout, gigabytes, npy_header, read_manifest, write_manifest


class CacheWriter:
    """Fills a cache: any number of these, in any processes that see the same disk.

    manifest  from `new_manifest`
    """

    def __init__(self, folder, manifest):
        self.folder, self.manifest, self.layout = folder, manifest, Layout(manifest)
        self.progress_path = os.path.join(folder, "progress.npy")
        self.progress_header = npy_header((self.layout.count,), np.dtype("u1"))

    def is_complete(self):
        """Whether there is nothing left to do; a `UserError` where the folder is a cache of something else."""
        if not os.path.exists(os.path.join(self.folder, "manifest.json")):
            return False
        found = read_manifest(self.folder)
        differing = [name for name in IDENTITY if found[name] != self.manifest[name]]
        if differing:
            raise UserError(f"--features-path {self.folder} holds another cache: {_difference(found, self.manifest)}. "
                            "Name another folder, or remove this one")
        return found["complete"]

    def bytes_left(self):
        """How much of the disk the files will take that they do not take yet."""
        taken = [os.stat(path).st_blocks * 512 for path in self._paths() if os.path.exists(path)]
        return max(0, sum(self.layout.sizes) - sum(taken))

    def _paths(self):
        return [os.path.join(self.folder, name) for name in self.layout.names]

    def prepare(self, data):
        """Make the folder and its files, or find them (one process only).

        raise  UserError where the disk cannot hold them
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            free, left = shutil.disk_usage(self.folder).free, self.bytes_left()
            if free < left:
                raise UserError(f"--features-path {self.folder}: {gigabytes(left)} are needed, the disk has "
                                f"{gigabytes(free)} free. --no-flip halves the size; so does --dtype fp16 that of fp32")
            if os.path.exists(self.progress_path):
                self._check_files()
            else:
                for path, header, size in zip(self._paths(), self.layout.headers, self.layout.sizes):
                    _sparse_file(path, header, size)
                with whole_file(os.path.join(self.folder, "labels.npy")) as file:
                    np.save(file, np.array(data.labels, dtype=np.int64))
                with whole_file(os.path.join(self.folder, "paths.txt")) as file:
                    file.writelines(os.fsencode(_one_line(path)) + b"\n" for path in data.paths)
                write_manifest(self.folder, self.manifest)
                with whole_file(self.progress_path) as file:  # last: where it is, everything is
                    file.write(self.progress_header + bytes(self.layout.count))
        except OSError as error:
            raise UserError(f"--features-path {self.folder}: cannot be written to ({error})") from None

    def _check_files(self):
        """Half of a cache must be as it was left: what was encoded is not looked at again."""
        for path, size in zip(self._paths(), self.layout.sizes):
            if not os.path.exists(path) or os.path.getsize(path) != size:
                raise UserError(f"{path} is missing or was changed since; remove the folder {self.folder} and start "
                                "again")

    def progress(self):
        """(count,) uint8: what has become of each image."""
        return np.fromfile(self.progress_path, dtype=np.uint8, offset=len(self.progress_header))

    def missing(self, batch_size):
        """What is left to encode: ranges (first, end) as `missing_ranges` cuts them."""
        return missing_ranges(self.progress() != MISSING, batch_size)

    def write(self, first, moments, is_bad):
        """Keep the images first .. first + n - 1.

        moments  (n, orientations, 2C, h, w) floating point, on the CPU
        is_bad   n truth values: there is no such image, and its moments are zeros
        raise    UserError where the disk does not take them, or the dtype cannot hold them
        """
        moments = moments.to(self.layout.torch_dtype)
        if not torch.isfinite(moments).all():
            raise UserError(f"--dtype {self.manifest['dtype']}: the latents of the images {first} .. "
                            f"{first + len(moments) - 1} are not finite in it; bf16 and fp32 hold larger numbers")
        rows = moments.contiguous().view(torch.uint8).numpy().reshape(len(moments), -1)
        try:
            for number, offset, begin, end in self.layout.pieces(first, first + len(moments)):
                _write_at(self._paths()[number], offset, rows[begin - first:end - first].tobytes())
            # Marked when it lies on the disk: not even a power cut leaves a row that is marked and not there.
            states = bytes(BAD if bad else ENCODED for bad in is_bad)
            _write_at(self.progress_path, len(self.progress_header) + first, states, sync=False)
        except OSError as error:
            raise UserError(f"--features-path {self.folder}: cannot write the images {first} .. "
                            f"{first + len(moments) - 1} ({error}). What was written stays: run the command again "
                            "when there is room") from None

    def finish(self, data, files):
        """Declare the cache complete (one process only); returns how many images were unreadable.

        files  {name: SHA-256} of all its files
        """
        progress = self.progress()
        if (progress == BAD).all():
            raise UserError("none of the images could be read")
        bad = [[int(index), data.paths[index]] for index in np.flatnonzero(progress == BAD)]
        sizes = {name: os.path.getsize(os.path.join(self.folder, name)) for name in files}
        write_manifest(self.folder, self.manifest | dict(
            complete=True, bad_images=bad,
            files={name: dict(bytes=sizes[name], sha256=files[name]) for name in sorted(files)}))
        self.clean()
        return len(bad)

    def clean(self):
        """Remove what only the making needed."""
        if os.path.exists(self.progress_path):
            os.remove(self.progress_path)

    def file_names(self):
        return [*self.layout.names, "labels.npy", "paths.txt"]


def _sparse_file(path, header, size):
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def _write_at(path, offset, data, sync=True):
    """Write bytes at a place of a file; `sync`: onto the disk."""
    file = os.open(path, os.O_WRONLY)
    try:
        data = memoryview(data)
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def _one_line(path):
    if "\n" in path or "\r" in path:
        raise UserError(f"the file name {path!r} has a line break in it; rename it")
    return path


def _difference(found, wanted):
    """The first things in which two manifests differ, both values named."""
    names = [name for name in IDENTITY if found[name] != wanted[name]]
    parts = []
    for name in names[:3]:
        if name == "vae_sha256":
            parts.append(f"its VAE is {found['vae']} (weights {found[name][:12]}), "
                         f"this one is {wanted['vae']} ({wanted[name][:12]})")
        elif name in ("listing_sha256", "classes"):
            parts.append(f"the images, their classes or their order are others than those in {wanted['data_path']}")
        elif name == "space":
            inner = [key for key in found[name] if found[name][key] != wanted[name].get(key)]
            parts += [f"{key} is {found[name][key]} there, {wanted[name].get(key)} here" for key in inner]
        else:
            parts.append(f"{name} is {found[name]} there, {wanted[name]} here")
    return "; ".join(parts)
