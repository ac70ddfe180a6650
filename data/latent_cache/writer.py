"""Filling a latent cache, by any number of processes, over any number of restarts."""

import os
import shutil
from contextlib import contextmanager, suppress

import numpy as np
import torch
from filelock import FileLock, Timeout

from common import distributed
from common.errors import UserError
from common.files import atomic_write, format_bytes, remove_temporary_files
from data.latent_cache.manifest import (
    BAD,
    ENCODED,
    IDENTITY,
    MISSING,
    Layout,
    npy_header,
    read_manifest,
    write_manifest,
)
from data.latent_cache.reader import LatentCache

LOCK = "extraction.lock"  # there while it is being made


class LatentCacheWriter:
    """Fills a cache: any number of these, in any processes that see the same disk.

    manifest  from `new_manifest`
    """

    def __init__(self, folder, manifest):
        self.folder, self.manifest, self.layout = folder, manifest, Layout(manifest)
        self.progress_path = os.path.join(folder, "progress.npy")
        self.progress_header = npy_header((self.layout.count,), np.dtype("u1"))

    def is_complete(self):
        """Whether there is nothing left to do; a `UserError` where the folder is of something else, or damaged."""
        if not os.path.exists(os.path.join(self.folder, "manifest.json")):
            names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
            if any(name != LOCK and not name.startswith("manifest.json.") for name in names):
                raise UserError(f"--features-path {self.folder} is not empty, and has no manifest.json of a latent "
                                "cache: name another folder, or empty this one")
            return False
        found = read_manifest(self.folder)
        if differences := _differences(found, self.manifest):
            raise UserError(f"--features-path {self.folder} holds another cache: {differences}. Name another folder, "
                            "or remove this one")
        if found["complete"]:
            LatentCache(self.folder)  # says what is wrong with it, if anything is
        return found["complete"]

    @contextmanager
    def locked(self):
        """Keep other runs out of the folder: each would do the work of the other again."""
        path = os.path.join(self.folder, LOCK)
        try:
            os.makedirs(self.folder, exist_ok=True)
            lock = FileLock(path).acquire(blocking=False)
        except Timeout:
            raise UserError(f"--features-path {self.folder}: another extraction is writing to it. (Processes that "
                            "survived their launcher count, too: look for extract_features.py)") from None
        except OSError as error:
            raise UserError(f"--features-path {self.folder}: cannot be written to ({error})") from None
        with lock:
            try:
                yield
            finally:
                with suppress(FileNotFoundError):  # somebody removed the folder
                    os.remove(path)

    def bytes_left(self):
        """How much of the disk the files will take that they do not take yet."""
        taken = [os.stat(path).st_blocks * 512 for path in self._paths() if os.path.exists(path)]
        return max(0, sum(self.layout.sizes) - sum(taken))

    def _paths(self):
        return [os.path.join(self.folder, name) for name in self.layout.names]

    def prepare(self, data):
        """Make the files, or find those that an earlier run left (one process only, within `locked`).

        raise  UserError where the disk cannot hold them, or what is there was changed
        """
        paths = b"".join(os.fsencode(_one_line(path)) + b"\n" for path in data.paths)
        try:
            os.makedirs(self.folder, exist_ok=True)
            free, left = shutil.disk_usage(self.folder).free, self.bytes_left()
            if free < left:
                raise UserError(f"--features-path {self.folder}: {format_bytes(left)} are needed, the disk has "
                                f"{format_bytes(free)} free. --no-flip halves the size; so does --dtype fp16 that of fp32")
            write_manifest(self.folder, self.manifest)
            with atomic_write(os.path.join(self.folder, "labels.npy")) as file:
                np.save(file, np.array(data.labels, dtype=np.int64))
            with atomic_write(os.path.join(self.folder, "paths.txt")) as file:
                file.write(paths)
            if os.path.exists(self.progress_path):
                self._check_files()
                # What could not be read may have been repaired since.
                progress = self.progress()
                progress[progress == BAD] = MISSING
            else:
                for path, header, size in zip(self._paths(), self.layout.headers, self.layout.sizes):
                    _sparse_file(path, header, size)
                progress = np.zeros(self.layout.count, dtype=np.uint8)
            with atomic_write(self.progress_path) as file:  # last: where it is, everything is
                file.write(self.progress_header + progress.tobytes())
        except OSError as error:
            raise UserError(f"--features-path {self.folder}: cannot be written to ({error})") from None

    def _check_files(self):
        """Half of a cache must be as it was left: what was encoded is not looked at again."""
        progress = (self.progress_path, self.progress_header, len(self.progress_header) + self.layout.count)
        for path, header, size in (*zip(self._paths(), self.layout.headers, self.layout.sizes), progress):
            plain = os.path.isfile(path) and not os.path.islink(path)  # nothing is written through a link
            if not (plain and os.path.getsize(path) == size and _begins_with(path, header)):
                raise UserError(f"{path} is missing or was changed since; remove the folder {self.folder} and start "
                                "again")

    def progress(self):
        """(count,) uint8: what has become of each image."""
        return np.fromfile(self.progress_path, dtype=np.uint8, offset=len(self.progress_header))

    def missing(self, batch_size):
        """What is left to encode: ranges (first, end) as `missing_ranges` cuts them."""
        return distributed.missing_ranges(self.progress() != MISSING, batch_size)

    def mark_bad(self, indices):
        """Note images that cannot be read, and return how many there are now, of all processes."""
        for index in indices:
            _write_at(self.progress_path, len(self.progress_header) + index, bytes([BAD]), sync=False)
        return int((self.progress() == BAD).sum())

    def write(self, first, moments, is_bad):
        """Keep the images first .. first + n - 1.

        moments  (n, orientations, 2C, h, w) floating point, on the CPU
        is_bad   n truth values: there is no such image, and its moments are zeros
        raise    UserError where the disk does not take them, or the dtype cannot hold them
        """
        computed, moments = moments, moments.to(self.layout.torch_dtype)
        if not torch.isfinite(moments).all():
            where = f"of the images {first} .. {first + len(moments) - 1}"
            if not torch.isfinite(computed).all():
                raise UserError(f"--vae {self.manifest['vae']} gives latents {where} that are not finite; try "
                                "--precision fp32")
            raise UserError(f"--dtype {self.manifest['dtype']} cannot hold the latents {where} (up to "
                            f"{computed.abs().max():.3g}); bf16 and fp32 hold larger numbers")
        rows = moments.contiguous().view(torch.uint8).numpy().reshape(len(moments), -1)
        try:
            for number, offset, begin, end in self.layout.pieces(first, first + len(moments)):
                _write_at(self._paths()[number], offset, rows[begin - first:end - first].tobytes())
            # Marked when it lies on the disk: not even a power cut leaves a row that is marked and not there.
            states = bytes(BAD if bad else ENCODED for bad in is_bad)
            _write_at(self.progress_path, len(self.progress_header) + first, states, sync=False)
        except OSError as error:
            raise UserError(f"--features-path {self.folder}: cannot write the images {first} .. "
                            f"{first + len(moments) - 1} ({error}). What was written stays: mend it, and run "
                            "the command again") from None

    def finish(self, data, files, max_bad_images=0):
        """Declare the cache complete (one process only); a `UserError` where too many images were unreadable.

        files  {name: SHA-256} of all its files
        """
        self._check_files()
        progress = self.progress()
        if (progress == BAD).all():
            raise UserError("none of the images could be read")
        if (progress == BAD).sum() > max_bad_images:
            raise UserError(f"{(progress == BAD).sum()} images could not be read, --max-bad-images is {max_bad_images}")
        bad = [[int(index), data.paths[index]] for index in np.flatnonzero(progress == BAD)]
        sizes = {name: os.path.getsize(os.path.join(self.folder, name)) for name in files}
        write_manifest(self.folder, self.manifest | dict(
            complete=True, bad_images=bad,
            files={name: dict(bytes=sizes[name], sha256=files[name]) for name in sorted(files)}))
        self.clean()

    def clean(self):
        """Remove what only the making needed."""
        remove_temporary_files(self.folder)
        if os.path.exists(self.progress_path):
            os.remove(self.progress_path)

    def file_names(self):
        return [*self.layout.names, "labels.npy", "paths.txt"]


def _sparse_file(path, header, size):
    if os.path.lexists(path):
        os.remove(path)
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _begins_with(path, header):
    with open(path, "rb") as file:
        return file.read(len(header)) == header


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


def _differences(found, wanted):
    """In what two manifests differ, both values named; "" where they do not."""
    names = [name for name in IDENTITY if found.get(name) != wanted[name]]
    if {"count", "classes", "listing_sha256"} & set(names):
        return ("the images, their classes or their order are not those that it was begun with "
                f"({found['count']} images there, {wanted['count']} in {wanted['data_path']})")
    parts = []
    for name in names:
        if name == "vae_sha256":
            parts.append(f"its VAE is {found['vae']} (weights {found[name][:12]}), --vae is {wanted['vae']} "
                         f"({wanted[name][:12]})")
        elif name == "space":
            parts += [f"{key} of its VAE is {found[name].get(key)}, of --vae {value}"
                      for key, value in wanted[name].items() if found[name].get(key) != value]
        elif name != "rows_per_file" or not parts:  # this one follows from the others
            parts.append(f"{IDENTITY[name] or name} is {found.get(name)} there, {wanted[name]} here")
    return "; ".join(parts)
