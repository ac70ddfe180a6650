"""Filling a latent cache, by any number of processes, over any number of restarts."""
import os
import shutil
from contextlib import contextmanager, suppress

import numpy as np
import torch
from filelock import FileLock, Timeout

from common import distributed
from common.errors import ArgumentError, UserError
from common.files import atomic_write, format_bytes, remove_temporary_files
from data.latent_cache.manifest import (
    CORRUPT,
    ENCODED,
    IDENTITY,
    MISSING,
    Layout,
    begins_with,
    npy_header,
    read_manifest,
    write_manifest,
)
from data.latent_cache.reader import LatentCache

LOCK = "extraction.lock"  # exists while a run writes


class LatentCacheWriter:
    """Fills a cache. Any number of these, in any processes that see the same disk, may fill one.

    Files are written with pwrite, not through memory maps: a full disk then raises an error, where a map of a sparse
    file would end the process by SIGBUS.
    """

    def __init__(self, features_path, manifest):
        self.folder, self.manifest, self.layout = features_path, manifest, Layout(manifest)
        self.progress_path = os.path.join(features_path, "progress.npy")
        self.progress_header = npy_header((self.layout.count,), np.dtype("u1"))

    def _error(self, problem):
        return ArgumentError(problem, features_path=self.folder)

    def is_complete(self):
        """Return whether nothing is left to do; raises a `UserError` if the folder holds anything but this cache."""
        if not os.path.exists(os.path.join(self.folder, "manifest.json")):
            names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
            if any(name != LOCK and not name.startswith("manifest.json.") for name in names):
                raise self._error("the folder is not empty, and has no manifest.json of a latent cache. Name another "
                                  "folder, or empty this one")
            return False
        existing = read_manifest(self.folder)
        raise_if_different(self.folder, existing, self.manifest)
        if existing["complete"]:
            LatentCache(self.folder)  # raises if it is damaged
        return existing["complete"]

    @contextmanager
    def locked(self):
        """Keep other runs out of the folder, which would do the same work again."""
        path = os.path.join(self.folder, LOCK)
        try:
            os.makedirs(self.folder, exist_ok=True)
            lock = FileLock(path).acquire(blocking=False)
        except Timeout:
            raise self._error("another extraction is writing to it. If you started none, look for processes of "
                              "extract_features.py that outlived their launcher") from None
        except OSError as error:
            raise self._error(f"cannot be written to ({error})") from None
        with lock:
            try:
                yield
            finally:
                with suppress(FileNotFoundError):  # the folder may have been removed meanwhile
                    os.remove(path)

    def count_bytes_left(self):
        """Return how many bytes of the disk the moments will take in addition to what they take now."""
        taken = [os.stat(path).st_blocks * 512 for path in self._paths() if os.path.exists(path)]
        return max(0, sum(self.layout.sizes) - sum(taken))

    def _paths(self):
        return [os.path.join(self.folder, name) for name in self.layout.names]

    def prepare(self, dataset):
        """Create the files, or check those that an earlier run left. Called by one process, within `locked`."""
        paths = b"".join(os.fsencode(_check_one_line(path)) + b"\n" for path in dataset.paths)
        try:
            os.makedirs(self.folder, exist_ok=True)
            free, needed = shutil.disk_usage(self.folder).free, self.count_bytes_left()
            if free < needed:
                raise self._error(f"{format_bytes(needed)} are needed, the disk has {format_bytes(free)} free. Leave "
                                  "out mirror images, or use fp16 instead of fp32: each halves the size")
            write_manifest(self.folder, self.manifest)
            with atomic_write(os.path.join(self.folder, "labels.npy")) as file:
                np.save(file, np.array(dataset.labels, dtype=np.int64))
            with atomic_write(os.path.join(self.folder, "paths.txt")) as file:
                file.write(paths)
            if os.path.exists(self.progress_path):
                self._check_files()
                progress = self.progress()
                progress[progress == CORRUPT] = MISSING  # it may have been repaired since
            else:
                for path, rows in zip(self._paths(), self.layout.rows):
                    _create_sparse_npy(path, (rows, *self.layout.row_shape), self.layout.dtype)
                progress = np.zeros(self.layout.count, dtype=np.uint8)
            with atomic_write(self.progress_path) as file:  # last: if it exists, all files do
                file.write(self.progress_header + progress.tobytes())
        except OSError as error:
            raise self._error(f"cannot be written to ({error})") from None

    def _check_files(self):
        """Raise unless the files are as they were left: what is marked as encoded is not encoded again."""
        progress_size = len(self.progress_header) + self.layout.count
        expected = [*zip(self._paths(), self.layout.headers, self.layout.sizes),
                    (self.progress_path, self.progress_header, progress_size)]
        for path, header, size in expected:
            is_file = os.path.isfile(path) and not os.path.islink(path)  # nothing is written through a link
            if not (is_file and os.path.getsize(path) == size and begins_with(path, header)):
                raise UserError(f"{path} is missing or was changed. Remove the folder {self.folder} and start again")

    def progress(self):
        """Return the state of each image, shape (count,), uint8."""
        return np.fromfile(self.progress_path, dtype=np.uint8, offset=len(self.progress_header))

    def missing_ranges(self, batch_size):
        """List what is left to encode as ranges (start, end), see `distributed.missing_ranges`."""
        return distributed.missing_ranges(self.progress() != MISSING, batch_size)

    def mark_corrupt(self, indices):
        """Mark images as corrupt and return how many are, over all processes."""
        for index in indices:
            _write_at(self.progress_path, len(self.progress_header) + index, bytes([CORRUPT]), sync=False)
        return int((self.progress() == CORRUPT).sum())

    def write(self, start, moments, is_corrupt):
        """Write the moments of the images start .. start + n - 1.

        Args:
            start (int): Index of the first image.
            moments (Tensor): Moments on the CPU, shape (n, orientations, 2C, h, w), floating point.
            is_corrupt (list[bool]): Which images have no moments; theirs are zeros.
        """
        end = start + len(moments)
        rows = self._to_bytes(moments, f"the images {start} .. {end - 1}")
        try:
            for range_start, range_end in self.layout.split_by_file(start, end):
                number, offset = self.layout.locate(range_start)
                _write_at(self._paths()[number], offset, rows[range_start - start:range_end - start].tobytes())
            # Only after an fsync of the moments: a power cut leaves no image that is marked but not written.
            states = bytes(CORRUPT if corrupt else ENCODED for corrupt in is_corrupt)
            _write_at(self.progress_path, len(self.progress_header) + start, states, sync=False)
        except OSError as error:
            raise self._error(f"cannot write the images {start} .. {end - 1} ({error}). What was written is kept: "
                              "solve the problem and run the command again") from None

    def _to_bytes(self, moments, name):
        """Convert moments to bytes of the stored dtype, shape (n, B); raises if a value is or becomes non-finite."""
        stored = moments.to(self.layout.torch_dtype)
        if not torch.isfinite(moments).all():
            raise ArgumentError(f"the latents of {name} are non-finite. Try fp32", vae=self.manifest["vae"],
                                precision=self.manifest["precision"])
        if not torch.isfinite(stored).all():
            raise ArgumentError(f"cannot hold the latents of {name}, up to {moments.abs().max():.3g}. Use bf16 or fp32",
                                dtype=self.manifest["dtype"])
        return stored.contiguous().view(torch.uint8).numpy().reshape(len(moments), -1)

    def finish(self, dataset, checksums, max_bad_images=0):
        """Mark the cache as complete; `checksums` is {name: SHA-256} of `file_names()`. Called by one process."""
        self._check_files()
        corrupt = np.flatnonzero(self.progress() == CORRUPT)
        if len(corrupt) == self.layout.count:
            raise UserError("none of the images could be read")
        if len(corrupt) > max_bad_images:
            raise ArgumentError(f"{len(corrupt)} images could not be read", max_bad_images=max_bad_images)
        files = {name: dict(bytes=os.path.getsize(os.path.join(self.folder, name)), sha256=checksums[name])
                 for name in sorted(checksums)}
        bad_images = [[int(index), dataset.paths[index]] for index in corrupt]
        write_manifest(self.folder, self.manifest | dict(complete=True, bad_images=bad_images, files=files))
        self.remove_leftovers()

    def remove_leftovers(self):
        """Remove files that only the making needed."""
        remove_temporary_files(self.folder)
        if os.path.exists(self.progress_path):
            os.remove(self.progress_path)

    def file_names(self):
        """List the files of a complete cache, without the manifest."""
        return [*self.layout.names, "labels.npy", "paths.txt"]


def raise_if_different(folder, existing, wanted):
    """Raise an `ArgumentError` with the stored and the wanted values unless two manifests are of the same cache."""
    names = [name for name in IDENTITY if existing.get(name) != wanted[name]]
    if not names:
        return
    values = wanted | dict(flip=wanted["orientations"] == 2)
    parameters = {IDENTITY[name]: values[IDENTITY[name]] for name in names if IDENTITY[name]}
    if "data_path" in parameters:
        stored = [f"{existing['count']} other images, or other classes, or in another order"]
    elif "vae_sha256" in names:
        stored = [f"the VAE {existing['vae']} (weights {existing['vae_sha256'][:12]}, not {wanted['vae_sha256'][:12]})"]
    else:
        stored = [f"{name} {existing.get(name)}" for name in names if name != "rows_per_file"]  # follows from others
    raise ArgumentError(f"the folder holds another cache, of {', '.join(stored) or 'other file sizes'}. Name another "
                        "folder, or remove this one", features_path=folder, **parameters)


def _create_sparse_npy(path, shape, dtype):
    if os.path.lexists(path):
        os.remove(path)  # a link would be written through
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()


def _write_at(path, offset, data, sync=True):
    """Write bytes at an offset of an existing file; with `sync` they are on the disk afterwards."""
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


def _check_one_line(path):
    if "\n" in path or "\r" in path:
        raise UserError(f"the file name {path!r} has a line break in it. Rename it")
    return path
