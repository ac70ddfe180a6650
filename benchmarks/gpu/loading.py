"""Rows of loading: images a second from files and from latent caches, on the disk of the machine."""
import os
import tempfile

import torch

from benchmarks.dataloading import drop_page_cache, measure_rate, write_jpegs, write_random_cache
from data.image_folder import ImageFolderDataset
from data.latent_cache.reader import LatentCache


def measure_loading(scale, source, num_workers=8, batch=256, cold=False):
    """Return items a second that arrive on the device.

    Args:
        scale (Scale): Device and size.
        source (str): "images" (JPEG of 500x375, scaled to 256), "cache", or "cache on the device".
        num_workers (int): Processes that load.
        batch (int): Items of a batch.
        cold (bool): Whether the files are removed from the page cache of the system first.
    """
    device, num_workers, batch = torch.device(scale.device), 1 if scale.is_tiny else num_workers, scale.batch(batch)
    with tempfile.TemporaryDirectory() as folder:
        if source == "images":
            dataset = ImageFolderDataset(write_jpegs(os.path.join(folder, "jpegs"), 16 if scale.is_tiny else 1024), 256)
        else:
            path = write_random_cache(os.path.join(folder, "cache"), 64 if scale.is_tiny else 65_536)
            if cold:
                drop_page_cache(path)
            dataset = LatentCache(path)
        if source == "cache on the device":
            dataset = dataset.to_device(device)
        num_batches = 2 if scale.is_tiny else 5 if source == "images" else 40
        return measure_rate(dataset, num_workers, device, batch, num_batches, num_windows=scale.count(4))
