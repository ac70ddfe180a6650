"""How fast training gets its latents and images, and the memory that it takes.

Files are in the system's cache, but where a row says that they are cold.
"""

import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import Dataset

from autoencoder.vae import LatentScaling
from common.files import sha256_file
from data.dataset import Batch
from data.image_folder import ImageFolderDataset
from data.latent_cache.manifest import new_manifest
from data.latent_cache.reader import LatentCache
from data.latent_cache.writer import LatentCacheWriter
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler

WORKERS = 2


def measure(device):
    """Items a second, shuffled and mirrored as in training; latents of 4x32x32 as fp16 moments of both orientations."""
    device = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        small, large = (synthetic_cache(os.path.join(folder, f"cache-{n}"), n) for n in (8_192, 131_072))
        files = one_file_an_image(os.path.join(folder, "files"), 8_192)
        jpegs = ImageFolderDataset(jpeg_folder(os.path.join(folder, "jpegs"), 512), 256)
        rows = {f"memory, {len(LatentCache(path)):,} latents": memory(LatentCache(path), times, device)
                for path, times in ((small, 8), (large, 0.5))}  # as many items of either
        rows |= {f"cache, {n} workers": loading(LatentCache(large), n, device) for n in (0, 1, 2, 4)}
        rows["cache, 0 workers, cold"] = loading(dropped(LatentCache(large)), 0, device)
        rows["cache, --features-in-memory"] = loading(LatentCache(large).in_memory(device), 0, device)
        rows["a file an image, 2 workers"] = loading(files, WORKERS, device)
        rows["JPEG of 500x375, 2 workers"] = loading(jpegs, WORKERS, device, batch=32, batches=4)
    return rows


def line(name, row):
    return f"{name:30s} " + "   ".join(f"{key} {value:,.0f}" for key, value in row.items())


def loading(data, workers, device, batch=256, batches=40, windows=7):
    """Items a second: the median, lowest and highest of some windows of so many batches."""
    rates, start = [], None
    for step, _ in enumerate(batches_of(data, workers, device, batch, batches * (windows + 1) + 1)):
        if step % batches == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if step > batches:  # the first window warms up
                rates.append(batch * batches / (now - start))
            start = now
    return dict(items_per_second=statistics.median(rates), lowest=min(rates), highest=max(rates))


def memory(data, epochs, device, batch=256):
    """The most memory in MB that this process and its workers held while they read some epochs.

    Pages of the files are counted as long as a process has them mapped, and pages that several share, once (PSS).
    """
    own, most = psutil.Process(), 0
    for step, _ in enumerate(batches_of(data, WORKERS, device, batch, int(epochs * len(data)) // batch)):
        if step % 32 == 0:
            most = max(most, sum(process.memory_full_info().pss for process in [own, *own.children()]))
    return dict(megabytes=most / 1e6, file_megabytes=data.layout.row_bytes * len(data) / 1e6)


def batches_of(data, workers, device, batch, steps):
    order = StepBatchSampler(len(data), batch, slice(0, batch), seed=0, first=0, last=steps, flips=True)
    return PrefetchLoader(data, order, workers, device, on_bad=print)


def synthetic_cache(folder, count):
    """A cache of `count` random latents, written as extract_features.py writes it."""
    images = SimpleNamespace(labels=[0] * count, paths=[f"{i}.png" for i in range(count)], class_names=["all"])
    space = LatentScaling(channels=4, stride=8, scale=0.18215, shift=0.0)
    autoencoder = SimpleNamespace(space=space, channels=4, stride=8, name="none", encoder_sha256="none")
    writer = LatentCacheWriter(folder, new_manifest(images, "synthetic", autoencoder, 256, True, "fp16", "fp32"))
    writer.prepare(images)
    block = torch.randn(1024, 2, 8, 32, 32)
    for first in range(0, count, len(block)):
        writer.write(first, block, [False] * len(block))
    writer.finish(images, {name: sha256_file(os.path.join(folder, name)) for name in writer.file_names()})
    return folder


def dropped(data):
    """Let the system forget the files of a cache, as if they were read for the first time since it started."""
    for name in os.listdir(data.folder):
        with open(os.path.join(data.folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return data


class OneFileAnImage(Dataset):
    """The usual way: one .npy a sample, flip and posterior sample frozen in it. Stands here to be measured against."""

    on_device = False

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, keys):
        latents = [torch.from_numpy(np.load(self.paths[index])) for index, _ in keys]
        return Batch(torch.stack(latents), torch.zeros(len(keys), dtype=torch.long), [])


def one_file_an_image(folder, count):
    os.makedirs(folder)
    paths = [os.path.join(folder, f"{i}.npy") for i in range(count)]
    for path in paths:
        np.save(path, np.random.default_rng(0).standard_normal((4, 32, 32), dtype=np.float32))
    return OneFileAnImage(paths)


def jpeg_folder(folder, count):
    """Pictures of the usual size of ImageNet's, with about its bytes a picture (0.11 MB)."""
    os.makedirs(os.path.join(folder, "all"))
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = random.integers(0, 256, (94, 125, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(os.path.join(folder, "all", f"{i}.jpg"), quality=92)
    return folder
