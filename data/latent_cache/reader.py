"""A latent cache as training data."""

import mmap
import os

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset

from autoencoder.vae import CachedLatents, LatentScaling, load_autoencoder
from common.errors import UserError
from common.files import format_bytes, sha256_file
from data.dataset import Batch, evenly_spaced_indices
from data.latent_cache.manifest import ENCODED, Layout, read_manifest


class LatentCache(Dataset):
    """A complete cache as training data: batches of (index, flip) -> moments (n, 2C, h, w) and labels.

    An image that could not be read is replaced by the next one that could, as `LabeledImageDataset` does it, so that the run is
    that from the images themselves.
    """

    on_device = False

    def __init__(self, folder):
        self.folder, self.manifest = folder, read_manifest(folder)
        try:
            if not self.manifest["complete"]:
                raise UserError(describe_incomplete_cache(folder, self.manifest))
            self._check_labels()
            self.layout = Layout(self.manifest)
            self._check_files()
            self.class_names, self.flips = list(self.manifest["classes"]), self.manifest["orientations"] == 2
            self.space = LatentScaling(**self.manifest["space"])
            self.channels = self.space.image_channels
            self.substitutes = replace_corrupt_indices({index for index, _ in self.manifest["bad_images"]}, len(self))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
            raise UserError(f"{folder}/manifest.json says what cannot be ({type(error).__name__}: {error})") from None
        self._maps = None

    def _check_labels(self):
        path, count = os.path.join(self.folder, "labels.npy"), self.manifest["count"]
        if not os.path.isfile(path):
            raise UserError(f"--features-path {self.folder}: labels.npy is missing")
        if sha256_file(path) != self.manifest["files"]["labels.npy"]["sha256"]:
            raise UserError(f"--features-path {self.folder}: labels.npy was changed since it was written")
        self.labels = np.load(path, allow_pickle=False)
        if self.labels.shape != (count,) or self.labels.dtype != np.int64 or not count or (
                not 0 <= self.labels.min() <= self.labels.max() < len(self.manifest["classes"])):
            raise UserError(f"--features-path {self.folder}: labels.npy does not fit its manifest")

    def __len__(self):
        return self.manifest["count"]

    @property
    def image_size(self):
        return self.manifest["image_size"]

    def autoencoder(self, vae, image_size, device, decodes):
        """The `CachedLatents` of these latents.

        vae, image_size  what the user asked for, or None
        decodes          load the VAE, to decode with
        raise            UserError where the cache is of another VAE or size
        """
        made_by, there = self.manifest["vae"], f"the cache {self.folder}"
        sha256 = self.manifest["vae_sha256"]
        if image_size not in (None, self.image_size):
            raise UserError(f"--image-size {image_size}: {there} is of images of {self.image_size} pixels")
        name = vae or made_by
        # A name on the hub stands for the same weights as when the cache was made; a directory may hold others.
        if not decodes and name == made_by and not (vae and os.path.isdir(name)):
            return CachedLatents(name, self.space, sha256)
        try:
            own = load_autoencoder(name, self.channels, device if decodes else "cpu")
        except UserError as error:
            if vae is None:
                raise UserError(f"the VAE of {there} is not where it was: pass --vae and its new place, or leave out "
                                f"what needs it (--sample-every). [{error}]") from None
            raise UserError(f"{error}. (And {there} was made with --vae {made_by})") from None
        if not own.is_random:
            raise UserError(f"--vae {name}: {there} was made with the VAE {made_by}")
        if own.encoder_sha256 != sha256:
            raise UserError(f"--vae {name} is another VAE (weights {own.encoder_sha256[:12]}) than that of {there}: "
                            f"{made_by} ({sha256[:12]})")
        if own.space != self.space:
            raise UserError(f"--vae {name} has {own.space}, {there} was made with {self.space}")
        return CachedLatents(name, self.space, sha256, own if decodes else None)

    def examples(self, count):
        """Moments of up to `count` images from all over the data set: (n, 2C, h, w)."""
        return self.__getitems__([(index, False) for index in evenly_spaced_indices(len(self), count)]).images

    def __getstate__(self):  # worker processes map the files themselves
        return self.__dict__ | dict(_maps=None)

    def _check_files(self):
        """Names, sizes and shapes: what does not fit would be read as noise, or not at all."""
        expected = dict(zip(self.layout.names, self.layout.sizes))
        stated = self.manifest["files"]
        for name in [*expected, "labels.npy", "paths.txt"]:
            path = os.path.join(self.folder, name)
            size = os.path.getsize(path) if os.path.isfile(path) else None
            wanted = stated.get(name, {}).get("bytes")
            if size is None or size != wanted or wanted != expected.get(name, wanted):
                raise UserError(f"--features-path {self.folder}: {name} "
                                + ("is missing" if size is None else f"has {size} bytes, it should have {wanted}"))
        for name, header in zip(self.layout.names, self.layout.headers):
            with open(os.path.join(self.folder, name), "rb") as file:
                if file.read(len(header)) != header:
                    raise UserError(f"--features-path {self.folder}: {name} does not begin as the manifest says")

    def _files(self):
        if self._maps is None:
            self._maps = [_MappedRows(os.path.join(self.folder, name), len(header), rows, self.layout)
                          for name, header, rows in zip(self.layout.names, self.layout.headers, self.layout.rows)]
        return self._maps

    def __getitems__(self, keys):
        files = self._files()
        indices = [self.substitutes.get(index, index) for index, _ in keys]
        places = [(*divmod(index, self.layout.rows_per_file), int(flip)) for index, (_, flip) in zip(indices, keys)]
        for number, row, flip in places:
            files[number].will_need(row, flip)
        moments = np.empty((len(keys), *self.layout.row_shape[1:]), dtype=self.layout.dtype)
        for out, (number, row, flip) in zip(moments, places):
            out[...] = files[number].rows[row, flip]
        for number in {number for number, _, _ in places}:
            files[number].forget()
        return Batch(torch.from_numpy(moments).view(self.layout.torch_dtype),
                     torch.from_numpy(self.labels[indices]), [])

    def in_memory(self, device):
        """The whole cache in the memory of a device, as a `DeviceLatents`; a `UserError` where it does not fit."""
        needed, free = self.layout.row_bytes * len(self), _free_memory(device)
        if needed > free:
            raise UserError(f"--features-in-memory: {self.folder} takes {format_bytes(needed)}, {device} has "
                            f"{format_bytes(free)} free; leave the flag out, the files are read fast enough")
        try:
            moments = torch.empty((len(self), *self.layout.row_shape), dtype=self.layout.torch_dtype, device=device)
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            raise UserError(f"--features-in-memory: {self.folder} takes {format_bytes(needed)}, which {device} does not "
                            f"have in one piece ({str(error).splitlines()[0]})") from None
        block = max(1, (64 << 20) // self.layout.row_bytes)
        for first in range(0, len(self), block):
            end = min(first + block, len(self))
            for number, _, begin, stop in self.layout.pieces(first, end):
                file, start = self._files()[number], number * self.layout.rows_per_file
                rows = np.array(file.rows[begin - start:stop - start])
                moments[begin:stop] = torch.from_numpy(rows).view(self.layout.torch_dtype).to(device)
                file.forget()
        return DeviceLatents(self, moments)


class DeviceLatents(Dataset):
    """A `LatentCache` read to a device: the same answers, without a disk or a worker between."""

    on_device = True

    def __init__(self, cache, moments):
        self.cache, self.moments = cache, moments
        self.labels = torch.from_numpy(cache.labels).to(moments.device)
        self.class_names, self.flips, self.channels = cache.class_names, cache.flips, cache.channels

    def __len__(self):
        return len(self.labels)

    def examples(self, count):
        return self.cache.examples(count)

    def __getitems__(self, keys):
        places = torch.tensor([(self.cache.substitutes.get(index, index), flip) for index, flip in keys])
        index, flip = places.to(self.moments.device).unbind(1)
        return Batch(self.moments[index, flip], self.labels[index], [])


class _MappedRows:
    """The rows of a file as a memory map, read here and there.

    What a batch needs is asked for before any of it is touched: the disk then serves all of it at once, while plain
    reading would wait for each row in turn. Afterwards the pages are let go: they stay in the system's cache, but not
    in this process, whose memory would otherwise grow to the size of the cache.
    """

    def __init__(self, path, header_bytes, rows, layout):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.map.madvise(mmap.MADV_RANDOM)  # no reading ahead: the next row is elsewhere
        self.rows = np.ndarray((rows, *layout.row_shape), layout.dtype, buffer=self.map, offset=header_bytes)
        self.header_bytes, self.row_bytes = header_bytes, layout.row_bytes
        self.item_bytes = layout.row_bytes // layout.row_shape[0]

    def will_need(self, row, flip):
        start = self.header_bytes + row * self.row_bytes + flip * self.item_bytes
        first_page = start - start % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, first_page, start + self.item_bytes - first_page)

    def forget(self):
        self.map.madvise(mmap.MADV_DONTNEED)


def describe_incomplete_cache(folder, manifest):
    """The sentence on half of a cache."""
    path, count = os.path.join(folder, "progress.npy"), 0
    if os.path.exists(path):
        count = int((np.fromfile(path, dtype=np.uint8)[-manifest["count"]:] == ENCODED).sum())
    return (f"--features-path {folder} is not complete: {count} of {manifest['count']} images are there. Run "
            "extract_features.py again with the flags it was begun with")


def replace_corrupt_indices(bad, count):
    """{bad index: the next good one, in the order of the data set}."""
    found = {}
    for index in bad:
        good = next(other % count for other in range(index + 1, index + count) if other % count not in bad)
        found[index] = good
    return found


def _free_memory(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def verify(folder, rank=0, world=1, show=None):
    """Read every file of a complete cache; returns sentences on those that are not what was written.

    rank, world  read every world-th file from rank on
    show         called with the number of bytes of each block read
    """
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise UserError(describe_incomplete_cache(folder, manifest))
    faults = []
    for name in sorted(manifest["files"])[rank::world]:
        path, stated = os.path.join(folder, name), manifest["files"][name]
        if not os.path.isfile(path):
            faults.append(f"{name} is missing")
        elif os.path.getsize(path) != stated["bytes"]:
            faults.append(f"{name} has {os.path.getsize(path)} bytes, it should have {stated['bytes']}")
        else:
            try:
                found = sha256_file(path, on_block=show)
            except OSError as error:  # of a failing disk
                faults.append(f"{name} cannot be read ({error})")
                continue
            if found != stated["sha256"]:
                faults.append(f"{name} has the SHA-256 {found[:12]}..., it should have {stated['sha256'][:12]}...")
    return faults
