"""A set of samples on disk: written in parts by any number of ranks, then one .npz for ADM's suite."""
import glob
import json
import os
import re
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from common import distributed
from common.errors import UserError
from common.files import atomic_write, read_npz_array, sha256_file
from common.seeding import SAMPLE_LABEL, derive_seed
from data.image_io import UINT8_RULE

LABEL_DISTRIBUTIONS = ("uniform", "balanced")


def sample_labels(label_distribution, seed, indices, num_classes):
    """Choose the class labels of the samples `indices`: int64, shape (n,); label i is a function of (seed, i).

    "uniform" is random; "balanced" is 0, 1, 2, ... repeated, the same number of each class.
    """
    if label_distribution == "balanced":
        return np.array([i % num_classes for i in indices], dtype=np.int64)
    return np.array([np.random.default_rng(derive_seed(seed, SAMPLE_LABEL, i)).integers(num_classes) for i in indices])


def describe_sample_set(pipeline, count, seed, label_distribution, metadata):
    """Return the record of a set of samples; plain values.

    Args:
        pipeline (SamplingPipeline): What made the images.
        count (int): Number of images.
        seed (int): Seed of labels and noise.
        label_distribution (str): See `sample_labels`.
        metadata (dict): Metadata of the `LoadedModel` and of the environment.
    """
    options = dict(labels=label_distribution, seed=seed, uint8=UINT8_RULE)
    return dict(images=count, made=metadata | pipeline.metadata() | options)


class SampleSet:
    """Images 0 .. N-1 and their labels: parts in `FOLDER/parts` while they are being made, then `FOLDER.npz`.

    The .npz holds arr_0, uint8, shape (N, H, W, 3), and arr_1, int64, shape (N,). A finished set is also the
    beginning of a larger one. `FOLDER.json` is its record.
    """

    def __init__(self, folder):
        self.folder, self.npz, self.parts = folder, folder + ".npz", os.path.join(folder, "parts")

    def open(self):
        """Make the folder of the parts, or raise a `UserError` before any image is made."""
        try:
            os.makedirs(self.parts, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.parts} ({error})") from None

    @contextmanager
    def locked(self):
        """Keep other commands from making this set meanwhile; a lock ends with its process. Called by rank 0."""
        path = self.folder + ".lock"
        try:
            lock = FileLock(path).acquire(blocking=False)
        except Timeout:
            raise UserError(f"another command is making {self.npz} right now. Wait until it has finished, or name "
                            "another --sample-dir") from None
        except (OSError, NotImplementedError):  # a disk or system without locks: no protection
            yield
            return
        with lock:
            try:
                yield
            finally:
                with suppress(FileNotFoundError):
                    os.remove(path)

    def verify(self):
        """Raise a `UserError` if the .npz does not have the SHA-256 in its record. Called by rank 0."""
        record, count = self._read_record(), self.num_finished()
        # A record of fewer images is of the set before it grew: a kill came before the new record.
        if "sha256" in record and record.get("images") == count > 0 and record["sha256"] != sha256_file(self.npz):
            raise UserError(f"{self.npz} does not have the SHA-256 in {self.folder}.json beside it: one of them was "
                            "changed or damaged. Remove both to make the set again, or name another --sample-dir")

    def _read_record(self):
        try:
            with open(self.folder + ".json", encoding="utf-8") as file:
                record = json.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def num_finished(self):
        """Return the number of images in the .npz; 0 if there is none."""
        return len(read_npz_array(self.npz, "arr_0")) if os.path.exists(self.npz) else 0

    def missing(self, num_samples, batch_size):
        """Return the ranges (start, end) of the images still to be made, as `missing_ranges` cuts them."""
        done = np.zeros(num_samples, dtype=bool)
        done[:self.num_finished()] = True
        for start, end, _ in self._list_parts():
            done[start:end] = True
        return distributed.missing_ranges(done, batch_size)

    def _list_parts(self):
        """Return (start, end, path) of the parts on disk, in order."""
        names = os.listdir(self.parts) if os.path.isdir(self.parts) else []
        matches = filter(None, (re.fullmatch(r"(\d+)-(\d+)\.npz", name) for name in names))
        return sorted((int(match[1]), int(match[2]), os.path.join(self.parts, match[0])) for match in matches)

    def add(self, start, images, labels, png=False):
        """Write the part of samples start, start + 1, ...: uint8 (n, H, W, 3), int64 (n,); `png`: also as PNGs."""
        if png:
            self._write_pngs(start, images)
        path = os.path.join(self.parts, f"{start:07d}-{start + len(images):07d}.npz")
        with atomic_write(path) as file:
            np.savez(file, arr_0=images, arr_1=labels)

    def assemble(self, num_samples):
        """Write the .npz from all parts, unless it is complete already, and remove them.

        Returns the number of images that it holds, num_samples or more; missing ones raise a `UserError`.
        """
        num_finished = self.num_finished()
        if num_finished >= num_samples:
            self._remove_parts(num_finished)
            return num_finished
        if missing := self.missing(num_samples, num_samples):
            raise UserError(f"{self.parts} lacks the samples {missing[0][0]} .. {missing[0][1] - 1}: "
                            "do all processes write to the same disk?")
        finished = [(0, self.npz)] if num_finished else []
        parts = finished + [(start, path) for start, _, path in self._list_parts()]
        images = read_npz_array(parts[0][1], "arr_0")
        with atomic_write(self.npz) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, shape, dtype in (("arr_0", (num_samples, *images.shape[1:]), images.dtype),
                                       ("arr_1", (num_samples,), np.dtype(np.int64))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
                    np.lib.format.write_array_header_1_0(entry, header)
                    self._copy_rows(parts, name, num_samples, entry)
        self._remove_parts(num_samples)
        return num_samples

    @staticmethod
    def _copy_rows(parts, name, num_samples, entry, block=256):
        """Write rows 0 .. num_samples - 1 of an array to `entry`, in order, each once, a block in memory at a time."""
        written = 0
        for start, path in parts:
            rows = read_npz_array(path, name)
            end = min(start + len(rows), num_samples)
            while written < end:  # parts of runs with different batch sizes may overlap
                chunk = rows[written - start: min(written - start + block, end - start)]
                entry.write(np.ascontiguousarray(chunk).tobytes())
                written += len(chunk)

    def _remove_parts(self, num_samples):
        """Remove the parts inside the first num_samples, temporary files of killed runs, and empty folders."""
        paths = [path for _, end, path in self._list_parts() if end <= num_samples]
        for prefix in (self.parts + os.sep, self.npz):
            paths += glob.glob(glob.escape(prefix) + "*.tmp")
        for path in paths:
            os.remove(path)
        for folder in (self.parts, self.folder):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)

    def write_metadata(self, metadata):
        """Write `FOLDER.json`: `metadata` and the SHA-256 of the .npz, unless it describes this .npz already."""
        sha256 = sha256_file(self.npz)
        if self._read_record().get("sha256") == sha256:
            return
        with atomic_write(self.folder + ".json") as file:
            file.write((json.dumps(metadata | dict(sha256=sha256), indent=2) + "\n").encode())

    def write_pngs(self, num_samples, rank, world_size):
        """Write the images rank, rank + world_size, ... as FOLDER/000000.png, unless they exist."""
        images = read_npz_array(self.npz, "arr_0")
        os.makedirs(self.folder, exist_ok=True)
        for i in range(rank, num_samples, world_size):
            self._write_pngs(i, images[i: i + 1])

    def _write_pngs(self, start, images):
        for i, image in enumerate(images, start):
            path = os.path.join(self.folder, f"{i:06d}.png")
            if not os.path.exists(path):
                with atomic_write(path, sync=False) as file:
                    Image.fromarray(image).save(file, format="PNG")
