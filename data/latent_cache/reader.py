"""A latent cache as training data."""
import os
import weakref

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset

from common.errors import ArgumentError, UserError
from common.files import format_bytes, sha256_file
from data.dataset import Batch, evenly_spaced_indices, substitute_index
from data.latent_cache.manifest import ENCODED, Layout, begins_with, read_manifest

BLOCK_BYTES = 64 << 20  # read at once when the cache is copied to a device


class LatentCache(Dataset):
    """A complete cache as training data: batches of (index, flip) -> moments (n, 2C, h, w) and labels.

    A corrupt image is replaced as in `LabeledImageDataset`, so that training sees the same images.
    `autoencoder.load_cached_latents` draws latents from the moments. An incomplete or damaged cache is a `UserError`.

    Attributes (in addition to those of `LabeledImageDataset`):
        image_size (int): Pixels a side of the images.
        autoencoder_name (str): The VAE that encoded them, as the user named it.
        encoder_sha256 (str): Hash of the weights of its encoder.
        latent_scaling (dict): Fields of its `LatentScaling`.
    """

    on_device = False

    def __init__(self, features_path):
        self.folder, self.manifest = features_path, read_manifest(features_path)
        try:
            if not self.manifest["complete"]:
                raise incomplete_cache_error(features_path, self.manifest)
            self.labels = self._load_labels()
            self.layout = Layout(self.manifest)
            self._check_files()
            self.class_names, self.flips = list(self.manifest["classes"]), self.manifest["orientations"] == 2
            self.image_size = self.manifest["image_size"]
            self.autoencoder_name, self.encoder_sha256 = self.manifest["vae"], self.manifest["vae_sha256"]
            self.latent_scaling = self.manifest["space"]
            self.channels = self.latent_scaling["image_channels"]
            self.substitutes = replace_corrupt_indices({index for index, _ in self.manifest["bad_images"]}, len(self))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{features_path}/manifest.json is damaged ({type(error).__name__}: {error})") from None
        self._files = None

    def _load_labels(self):
        path, count = os.path.join(self.folder, "labels.npy"), self.manifest["count"]
        if not os.path.isfile(path):
            raise self._error("labels.npy is missing")
        if sha256_file(path) != self.manifest["files"]["labels.npy"]["sha256"]:
            raise self._error("labels.npy was changed since it was written")
        labels = np.load(path, allow_pickle=False)
        is_valid = labels.shape == (count,) and labels.dtype == np.int64
        if not is_valid or not 0 <= labels.min() <= labels.max() < len(self.manifest["classes"]):
            raise self._error("labels.npy does not fit its manifest")
        return labels

    def _check_files(self):
        """Check sizes and headers: moments of another shape would be read as noise."""
        for name in [*self.layout.names, "labels.npy", "paths.txt"]:
            problem = _check_size(os.path.join(self.folder, name), self.manifest["files"][name]["bytes"])
            if problem:
                raise self._error(f"{name} {problem}")
        for name, size, header in zip(self.layout.names, self.layout.sizes, self.layout.headers):
            path = os.path.join(self.folder, name)
            if os.path.getsize(path) != size or not begins_with(path, header):
                raise self._error(f"{name} has another header or size than the manifest describes")

    def _error(self, problem):
        return ArgumentError(f"{problem}. Copy the cache again, or encode it again", features_path=self.folder)

    def __len__(self):
        return self.manifest["count"]

    def examples(self, count):
        """Read the moments of up to `count` images, evenly spaced over the data set: shape (n, 2C, h, w)."""
        return self.__getitems__([(index, False) for index in evenly_spaced_indices(len(self), count)]).images

    def __getstate__(self):  # spawned workers open the files themselves
        return self.__dict__ | dict(_files=None)

    def open_files(self):
        """Return the open moments files; forked workers share them, since positions are given with each read."""
        if self._files is None:
            self._files = [_RandomAccessFile(os.path.join(self.folder, name)) for name in self.layout.names]
        return self._files

    def __getitems__(self, keys):
        files = self.open_files()
        indices = [self.substitutes.get(index, index) for index, _ in keys]
        places = [self.layout.locate(index, int(flip)) for index, (_, flip) in zip(indices, keys)]
        moments = np.empty((len(keys), *self.layout.row_shape[1:]), dtype=self.layout.dtype)
        # All are announced before any is read: a disk then serves them at once instead of in turn.
        for number, offset in places:
            files[number].prefetch(offset, moments[0].nbytes)
        for out, (number, offset) in zip(moments, places):
            files[number].read_into(out, offset)
        return Batch(torch.from_numpy(moments).view(self.layout.torch_dtype),
                     {"y": torch.from_numpy(self.labels[indices])}, [])

    def to_device(self, device):
        """Copy all moments to a device and return the same data set, read from there.

        Raises:
            ArgumentError: If they do not fit into its memory.
        """
        needed, free = self.layout.row_bytes * len(self), _free_memory(device)
        if needed > free:
            raise ArgumentError(f"{self.folder} takes {format_bytes(needed)}, {device} has {format_bytes(free)} free. "
                                "Leave the flag out: reading from files is fast enough", cache_on_device=True)
        try:
            moments = torch.empty((len(self), *self.layout.row_shape), dtype=self.layout.torch_dtype, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ArgumentError(f"{self.folder} takes {format_bytes(needed)}, which {device} cannot allocate in one "
                                f"block ({str(error).splitlines()[0]}). Leave the flag out",
                                cache_on_device=True) from None
        block = max(1, BLOCK_BYTES // self.layout.row_bytes)
        for block_start in range(0, len(self), block):
            for start, end in self.layout.split_by_file(block_start, min(block_start + block, len(self))):
                number, offset = self.layout.locate(start)
                rows = np.empty((end - start, *self.layout.row_shape), self.layout.dtype)
                self.open_files()[number].read_into(rows, offset)
                moments[start:end] = torch.from_numpy(rows).view(self.layout.torch_dtype).to(device)
        return DeviceLatents(self, moments)


class DeviceLatents(Dataset):
    """A `LatentCache` in the memory of a device: the same batches, without a disk or workers in between."""

    on_device = True

    def __init__(self, cache, moments):
        self.cache, self.moments = cache, moments
        self.labels = torch.from_numpy(cache.labels).to(moments.device)
        self.class_names, self.flips = cache.class_names, cache.flips
        self.channels, self.image_size = cache.channels, cache.image_size

    def __len__(self):
        return len(self.labels)

    def examples(self, count):
        """Read the moments of up to `count` images, evenly spaced over the data set."""
        return self.cache.examples(count)

    def __getitems__(self, keys):
        places = torch.tensor([(self.cache.substitutes.get(index, index), flip) for index, flip in keys])
        index, flip = places.to(self.moments.device).unbind(1)
        return Batch(self.moments[index, flip], {"y": self.labels[index]}, [])


class _RandomAccessFile:
    """A file that is read here and there, by any number of processes.

    pread, not `np.lib.format.open_memmap`: more than twice as fast at 16 KB a read, mapped pages do not count as
    memory of the process, and a file that was cut short raises an error where a map ends by SIGBUS.
    """

    def __init__(self, path):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._advise("POSIX_FADV_RANDOM", 0, 0)  # no read-ahead: the next row is elsewhere

    def _advise(self, advice, offset, size):
        if hasattr(os, advice):  # not on macOS
            os.posix_fadvise(self.descriptor, offset, size, getattr(os, advice))

    def prefetch(self, offset, size):
        """Ask the system to read bytes into its page cache, without waiting."""
        self._advise("POSIX_FADV_WILLNEED", offset, size)

    def read_into(self, array, offset):
        """Fill a contiguous array with the bytes from an offset on."""
        buffer = memoryview(array).cast("B")
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if not count:
                raise UserError(f"{self.path} was cut short while it was read. Copy the cache again")
            buffer, offset = buffer[count:], offset + count


def incomplete_cache_error(features_path, manifest):
    """Return the error for a cache that is not complete, with the number of images that are encoded."""
    path, count = os.path.join(features_path, "progress.npy"), 0
    if os.path.exists(path):
        count = int((np.fromfile(path, dtype=np.uint8)[-manifest["count"]:] == ENCODED).sum())
    return ArgumentError(f"the cache is not complete: {count} of {manifest['count']} images are encoded. Run "
                         "extract_features.py again with the same flags", features_path=features_path)


def replace_corrupt_indices(corrupt, count):
    """Return {corrupt index: the good one in its place}."""
    if len(corrupt) == count:
        raise ValueError("all images are corrupt")
    substitutes = {}
    for index in corrupt:
        substitute = substitute_index(index, count)
        while substitute in corrupt:
            substitute = substitute_index(substitute, count)
        substitutes[index] = substitute
    return substitutes


def _free_memory(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def verify(features_path, rank=0, world_size=1, on_block=None):
    """Describe each file of a complete cache that does not have its checksum.

    `world_size` callers share the files; `on_block` is called with the number of bytes of each block read.
    """
    manifest = read_manifest(features_path)
    if not manifest["complete"]:
        raise incomplete_cache_error(features_path, manifest)
    names = sorted(manifest["files"])[rank::world_size]
    problems = [_check_file(os.path.join(features_path, name), manifest["files"][name], on_block) for name in names]
    return [f"{name} {problem}" for name, problem in zip(names, problems) if problem]


def _check_size(path, size):
    if not os.path.isfile(path):
        return "is missing"
    if os.path.getsize(path) != size:
        return f"has {os.path.getsize(path)} bytes, it should have {size}"
    return None


def _check_file(path, stored, on_block):
    if problem := _check_size(path, stored["bytes"]):
        return problem
    try:
        actual_sha256 = sha256_file(path, on_block=on_block)
    except OSError as error:  # of a failing disk
        return f"cannot be read ({error})"
    if actual_sha256 != stored["sha256"]:
        return f"has the SHA-256 {actual_sha256[:12]}..., it should have {stored['sha256'][:12]}..."
    return None
