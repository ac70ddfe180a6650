"""Measure how fast training gets its latents and images, and what listing a data set costs.

    python -m benchmarks.dataloading throughput
    python -m benchmarks.dataloading listing --json docs/measurements/dataset_listing.json

`throughput` reads from files in the system's page cache, except in the rows that are cold. `listing` makes as many
empty files as ImageNet has in a temporary folder, and lists them as torchvision's `ImageFolder` does in every process,
and as `data.build_dataset` does on rank 0. Compare numbers of one run only.
"""
import argparse
import gc
import multiprocessing
import os
import resource
import socket
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
from common import distributed
from common.cli import HelpFormatter, parse_args, positive_int
from common.files import sha256_file
from common.provenance import collect_environment
from data import build_dataset
from data.dataset import Batch
from data.image_folder import ImageFolderDataset
from data.latent_cache.manifest import new_manifest
from data.latent_cache.reader import LatentCache
from data.latent_cache.writer import LatentCacheWriter
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from evaluation.records import write_record

NUM_WORKERS = 2
BATCH_SIZE = 256
NUM_CLASSES = 1000


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("measurement", choices=["throughput", "listing"])
    parser.add_argument("--num-images", type=positive_int, default=1_281_000, help="files to list")
    parser.add_argument("--num-rounds", type=positive_int, default=3, help="rounds of listing")
    parser.add_argument("--json", metavar="FILE", help="file for the results")
    flags, _ = parse_args(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = collect_environment(device) | dict(cores=len(psutil.Process().cpu_affinity()))
    is_throughput = flags.measurement == "throughput"
    rows = measure_throughput(device) if is_throughput else measure_listing(flags.num_images, flags.num_rounds)
    for name, row in rows.items():
        print(f"{name:34s} " + "   ".join(f"{key} {value:,.1f}" for key, value in row.items()))
    if flags.json:
        write_record(flags.json, dict(measurement=flags.measurement, environment=environment, results=rows))


# ---------------------------------------------------------------- throughput

def measure_throughput(device):
    """Measure items a second, shuffled and mirrored as in training, and the memory of the processes that read.

    Latents are of shape 4x32x32, stored as fp16 moments of both orientations.
    """
    with tempfile.TemporaryDirectory() as folder:
        small, large = (write_random_cache(os.path.join(folder, f"cache-{count}"), count) for count in (8_192, 131_072))
        files = write_latent_files(os.path.join(folder, "files"), 8_192)
        jpegs = ImageFolderDataset(write_jpegs(os.path.join(folder, "jpegs"), 512), 256)
        # Both read the same number of items.
        rows = {f"memory, {len(LatentCache(path)):,} latents": measure_memory(LatentCache(path), epochs, device)
                for path, epochs in ((small, 8), (large, 0.5))}
        for num_workers in (0, 1, 2, 4):
            rows[f"cache, {num_workers} workers"] = measure_rate(LatentCache(large), num_workers, device)
        drop_page_cache(large)
        rows["cache, 0 workers, cold"] = measure_rate(LatentCache(large), 0, device)
        rows["cache on the device"] = measure_rate(LatentCache(large).to_device(device), 0, device)
        rows["one file per latent, 2 workers"] = measure_rate(files, NUM_WORKERS, device)
        rows["JPEG of 500x375, 2 workers"] = measure_rate(jpegs, NUM_WORKERS, device, batch_size=32, num_batches=4)
    return rows


def measure_rate(dataset, num_workers, device, batch_size=BATCH_SIZE, num_batches=40, num_windows=7):
    """Measure items a second: median, lowest and highest of windows of `num_batches` batches."""
    rates, start = [], None
    num_steps = num_batches * (num_windows + 1) + 1
    for step, _ in enumerate(open_loader(dataset, num_workers, device, batch_size, num_steps)):
        if step % num_batches == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if step > num_batches:  # the first window warms up
                rates.append(batch_size * num_batches / (now - start))
            start = now
    return dict(items_per_second=statistics.median(rates), lowest=min(rates), highest=max(rates))


def measure_memory(cache, epochs, device):
    """Measure the peak in MB of the memory (PSS, with mapped pages) of this process and its workers reading a cache."""
    process, peak = psutil.Process(), 0
    num_steps = int(epochs * len(cache)) // BATCH_SIZE
    for step, _ in enumerate(open_loader(cache, NUM_WORKERS, device, BATCH_SIZE, num_steps)):
        if step % 32 == 0:
            peak = max(peak, sum(each.memory_full_info().pss for each in [process, *process.children()]))
    return dict(peak_mb=peak / 1e6, files_mb=cache.layout.row_bytes * len(cache) / 1e6)


def open_loader(dataset, num_workers, device, batch_size, num_steps):
    """Open the loader of a training run of `num_steps` steps."""
    batches = StepBatchSampler(len(dataset), batch_size, slice(0, batch_size), seed=0, start_step=0, end_step=num_steps,
                               flips=True)
    return PrefetchLoader(dataset, batches, num_workers, device, on_corrupt=print)


def write_random_cache(folder, count):
    """Write a cache of random latents as extract_features.py does; returns its folder."""
    images = SimpleNamespace(labels=[0] * count, paths=[f"{i}.png" for i in range(count)], class_names=["all"])
    scaling = LatentScaling(channels=4, stride=8, scale=0.18215, shift=0.0)
    autoencoder = SimpleNamespace(latent_scaling=scaling, channels=4, stride=8, name="none", encoder_sha256="none")
    writer = LatentCacheWriter(folder, new_manifest(images, "random", autoencoder, 256, True, "fp16", "fp32"))
    writer.prepare(images)
    block = torch.randn(min(1024, count), 2, 8, 32, 32)
    for start in range(0, count, len(block)):
        writer.write(start, block, [False] * len(block))
    writer.finish(images, {name: sha256_file(os.path.join(folder, name)) for name in writer.file_names()})
    return folder


def drop_page_cache(folder):
    """Remove the files of a folder from the system's page cache, as if they had not been read since it started."""
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class LatentFiles(Dataset):
    """The usual alternative to a cache: one .npy per image, with a fixed flip and posterior sample."""

    on_device = False

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, keys):
        latents = [torch.from_numpy(np.load(self.paths[index])) for index, _ in keys]
        return Batch(torch.stack(latents), {"y": torch.zeros(len(keys), dtype=torch.long)}, [])


def write_latent_files(folder, count):
    """Write random latents, one file each."""
    os.makedirs(folder)
    paths = [os.path.join(folder, f"{i}.npy") for i in range(count)]
    for path in paths:
        np.save(path, np.random.default_rng(0).standard_normal((4, 32, 32), dtype=np.float32))
    return LatentFiles(paths)


def write_jpegs(folder, count):
    """Write pictures of the usual size and number of bytes of ImageNet's (0.11 MB)."""
    os.makedirs(os.path.join(folder, "all"))
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = random.integers(0, 256, (94, 125, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(os.path.join(folder, "all", f"{i}.jpg"), quality=92)
    return folder


# ---------------------------------------------------------------- listing

def measure_listing(num_images, num_rounds):
    """Measure the seconds and the memory of listing a data set, in 1 and 2 processes.

    The ways take turns; seconds are the median of the rounds, memory is that of the last one. A process is measured
    against itself with a data set of one image: `uss_mb` and `pss_mb` are what it holds afterwards, `peak_mb` the
    growth of its largest resident set, `worker_uss_mb` what a forked worker copies when it reads every path and label.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = os.path.join(folder, "tiny"), os.path.join(folder, "large")
        write_empty_images(tiny, 1, 1)
        write_empty_images(large, num_images, NUM_CLASSES)
        rows = {}
        for num_processes in (1, 2):
            rounds = [{name: run_listing_processes(name, num_processes, tiny, large) for name in LISTINGS}
                      for _ in range(num_rounds)]
            for name, row in rounds[-1].items():
                seconds = [rows_of_round[name]["seconds"] for rows_of_round in rounds]
                rows[f"{name}, {num_processes} processes"] = row | dict(
                    seconds=statistics.median(seconds), lowest=min(seconds), highest=max(seconds))
    return rows


def write_empty_images(folder, count, num_classes):
    """Make empty files with names like ImageNet's."""
    for label in range(num_classes):
        name = f"n{label:08d}"
        os.makedirs(os.path.join(folder, name))
        for number in range(label, count, num_classes):
            os.close(os.open(os.path.join(folder, name, f"{name}_{number}.JPEG"), os.O_CREAT))


def list_with_torchvision(folder):
    """List a folder in every process, in Python lists."""
    from torchvision.datasets import ImageFolder
    dataset = ImageFolder(folder)
    return dataset.classes, dataset.targets, [os.path.relpath(path, folder) for path, _ in dataset.samples]


def list_on_rank0(folder):
    """List a folder as train.py does."""
    dataset = build_dataset(folder, 256, collective=True)
    return dataset.class_names, dataset.labels, dataset.paths


LISTINGS = {"torchvision in every process": list_with_torchvision, "rank 0, broadcast": list_on_rank0}


def run_listing_processes(name, num_processes, tiny, large):
    """Start processes that list a folder together, and return the mean of what they measured."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=run_listing, args=(name, rank, num_processes, port, tiny, large, results))
                 for rank in range(num_processes)]
    for process in processes:
        process.start()
    rows = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def run_listing(name, rank, num_processes, port, tiny, large, results):
    """List a folder in one of several processes, and send what it costs to `results`."""
    if num_processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init()
    LISTINGS[name](tiny)  # imports what it needs
    gc.collect()
    before, start_peak = psutil.Process().memory_full_info(), peak_resident_bytes()
    distributed.barrier()
    start = time.perf_counter()
    _, labels, paths = LISTINGS[name](large)
    distributed.barrier()
    seconds = time.perf_counter() - start
    gc.collect()
    after, end_peak = psutil.Process().memory_full_info(), peak_resident_bytes()
    row = dict(seconds=seconds, uss_mb=(after.uss - before.uss) / 1e6, pss_mb=(after.pss - before.pss) / 1e6,
               peak_mb=(end_peak - max(start_peak, before.rss)) / 1e6, worker_uss_mb=measure_worker(labels, paths))
    results.put(row)
    distributed.shutdown()


def peak_resident_bytes():
    """Return the largest resident set that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_worker(labels, paths):
    """Measure how many MB a forked worker copies when it reads every path and label."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def read_all():
        process, before = psutil.Process(), psutil.Process().memory_full_info().uss
        for index in range(len(labels)):
            _ = labels[index], paths[index]
        results.put((process.memory_full_info().uss - before) / 1e6)

    worker = context.Process(target=read_all)
    worker.start()
    worker.join()
    return results.get()


if __name__ == "__main__":
    main()
