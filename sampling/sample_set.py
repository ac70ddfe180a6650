"""A set of samples on disk: made in any order by any number of processes, never twice, then one .npz for ADM's suite.
"""

import glob
import json
import os
import re
import zipfile

import numpy as np
from PIL import Image

from common import distributed
from common.errors import UserError
from common.files import atomic_write, read_npz_array, sha256_file
from common.seeding import SAMPLE_LABEL, derive_seed
from data.image_io import UINT8_RULE


def random_labels(seed, indices, num_classes):
    """Uniform random class labels; that of sample i is a function of (seed, i)."""
    return np.array([np.random.default_rng(derive_seed(seed, SAMPLE_LABEL, i)).integers(num_classes) for i in indices])


def sample_labels(policy, seed, indices, num_classes):
    """The class labels of samples, each a function of (seed, its index).

    policy  "uniform": random; "balanced": 0, 1, 2, ... over and over, so that every class has as many
    return  (n,) int64
    """
    if policy == "balanced":
        return np.array([i % num_classes for i in indices], dtype=np.int64)
    return random_labels(seed, indices, num_classes)


def describe_sample_set(make, count, seed, labels, made_of):
    """What a set of samples is; plain values.

    make     the `SamplingPipeline`
    made_of  a `LoadedModel`'s record, and what else belongs to it
    """
    return dict(images=count, made=made_of | make.metadata() | dict(labels=labels, seed=seed, uint8=UINT8_RULE))


class SampleSet:
    """Images 0 .. N-1 and their labels: parts in `FOLDER/parts` while they are being made, `FOLDER.npz` at the end.

    The file holds arr_0 (N, H, W, 3) uint8 and arr_1 (N,) int64. A set that is there already is a beginning of a
    larger one.
    """

    def __init__(self, folder):
        self.folder, self.npz, self.parts = folder, folder + ".npz", os.path.join(folder, "parts")

    def open(self):
        """Make the folder; before the work, not after it, is the time to hear that it cannot be."""
        try:
            os.makedirs(self.parts, exist_ok=True)
        except OSError as error:
            raise UserError(f"--sample-dir: cannot make the folder {self.parts} ({error})") from None

    def finished(self):
        """How many images the .npz holds; 0 if there is none."""
        return len(read_npz_array(self.npz, "arr_0")) if os.path.exists(self.npz) else 0

    def missing(self, num_samples, batch_size):
        """What is left to make: ranges (first, end) as `missing_ranges` cuts them."""
        done = np.zeros(num_samples, dtype=bool)
        done[: self.finished()] = True
        for first, end, _ in self._parts():
            done[first:end] = True
        return distributed.missing_ranges(done, batch_size)

    def _parts(self):
        """(first, end, path) of the parts on disk, in order."""
        names = os.listdir(self.parts) if os.path.isdir(self.parts) else []
        found = [(int(match[1]), int(match[2]), os.path.join(self.parts, name))
                 for name in names if (match := re.fullmatch(r"(\d+)-(\d+)\.npz", name))]
        return sorted(found)

    def add(self, first, images, labels, png=False):
        """Keep a batch: images (n, H, W, 3) uint8 and labels (n,) of the samples first .. first + n - 1."""
        if png:
            self._write_pngs(first, images)
        path = os.path.join(self.parts, f"{first:07d}-{first + len(images):07d}.npz")
        with atomic_write(path) as file:
            np.savez(file, arr_0=images, arr_1=labels)

    def assemble(self, num_samples):
        """Write the .npz from all parts, a part in memory at a time, and remove them; nothing, if it is there already.

        return how many images it holds: num_samples, or more
        raise  UserError where samples are missing: processes on several machines need a folder that all of them see
        """
        if self.finished() >= num_samples:
            self._remove_parts(self.finished())
            return self.finished()
        if left := self.missing(num_samples, num_samples):
            raise UserError(f"{self.parts} lacks the samples {left[0][0]} .. {left[0][1] - 1}: "
                            "do all processes write to the same disk?")
        pieces = [(0, self.npz)] if self.finished() else []
        pieces += [(first, path) for first, _, path in self._parts()]
        images = read_npz_array(pieces[0][1], "arr_0")
        with atomic_write(self.npz) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, shape, dtype in (("arr_0", (num_samples, *images.shape[1:]), images.dtype),
                                       ("arr_1", (num_samples,), np.dtype(np.int64))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
                    np.lib.format.write_array_header_1_0(entry, header)
                    self._copy(pieces, name, num_samples, entry)
        self._remove_parts(num_samples)
        return num_samples

    def describe(self, record):
        """Write beside the .npz, as `FOLDER.json`, what it is: `record`, a plain dictionary, and its SHA-256."""
        path, sha256 = self.folder + ".json", sha256_file(self.npz)
        try:
            with open(path, encoding="utf-8") as file:
                if json.load(file)["sha256"] == sha256:
                    return
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass  # there is none, or of another set
        with atomic_write(path) as file:
            file.write((json.dumps(record | dict(sha256=sha256), indent=2) + "\n").encode())

    def _remove_parts(self, num_samples):
        used = [path for _, end, path in self._parts() if end <= num_samples]  # the others are of a larger set
        unfinished = [path for folder in (self.parts + os.sep, self.npz) for path in glob.glob(
            glob.escape(folder) + "*.tmp")]  # what a kill left
        for path in used + unfinished:
            os.remove(path)
        for folder in (self.parts, self.folder):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)

    @staticmethod
    def _copy(pieces, name, num_samples, entry, block=256):
        """Write rows 0 .. num_samples - 1 of an array to `entry`, in order, each once."""
        at = 0
        for first, path in pieces:
            rows = read_npz_array(path, name)
            stop = min(first + len(rows), num_samples)
            while at < stop:  # parts made with another batch size may overlap: then only their rest is new
                piece = rows[at - first: min(at - first + block, stop - first)]
                entry.write(np.ascontiguousarray(piece).tobytes())
                at += len(piece)

    def write_pngs(self, num_samples, rank, world):
        """Write the images rank, rank + world, ... that are not there yet as FOLDER/000000.png."""
        images = read_npz_array(self.npz, "arr_0")
        os.makedirs(self.folder, exist_ok=True)
        for i in range(rank, num_samples, world):
            self._write_pngs(i, images[i: i + 1])

    def _write_pngs(self, first, images):
        for i, image in enumerate(images, start=first):
            path = os.path.join(self.folder, f"{i:06d}.png")
            if not os.path.exists(path):
                with atomic_write(path, sync=False) as file:
                    Image.fromarray(image).save(file, format="PNG")
