"""Encode a data set by a VAE once, to train from the latents: train.py --features-path.

    torchrun --nproc_per_node=8 extract_features.py --data-path /data/imagenet/train --features-path /data/latents-256
    python extract_features.py --features-path /data/latents-256 --verify

The cache holds mean and log-variance of the posterior of each image and of its mirror image, so that training draws
flips and samples in every epoch as it does from the images. A run that was killed resumes. See docs/latents.md.
"""
import common.startup  # noqa: F401

import argparse
import os
import sys
from contextlib import ExitStack

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from autoencoder.checks import NUM_CHECK_IMAGES, check_autoencoder
from autoencoder.vae import latent_size, load_autoencoder
from common import distributed
from common.cli import HelpFormatter, non_negative_int, parse_args, path_or_name, positive_int
from common.errors import ArgumentError, UserError, run_command
from common.files import BackgroundWriter, check_writable, format_bytes, sha256_file
from common.resources import check_memory, check_num_workers
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.corrupt_images import CorruptImage, corrupt_image_error, raise_if_unreadable
from data.dataset import describe_dataset
from data.latent_cache.manifest import DTYPES, new_manifest, read_manifest
from data.latent_cache.reader import verify
from data.latent_cache.writer import LatentCacheWriter
from data.loader import raise_worker_deaths

TIMEOUT = 7 * 24 * 60  # minutes: one rank may need hours more than another; a rank that dies is noticed all the same


def build_parser():
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", help="folder with one folder of images per class, or: digits, fractals")
    group.add_argument("--features-path", required=True, help="folder of the cache")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    group.add_argument("--num-classes", type=positive_int, default=BUILTIN_DATASETS["fractals"]["num_classes"],
                       help="number of classes of the fractals")
    group.add_argument("--vae", default="ema", help="ema, mse, a diffusers directory or hub name")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="encode the mirror images too (default: not those of digits and fractals)")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="type of the stored moments")
    group = parser.add_argument_group("computing")
    group.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="tf32",
                       help="precision of the encoder; tf32 is float32 with TF32 products on GPUs, as in train.py")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images encoded at once by a rank")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes of a rank that load images")
    group.add_argument("--max-bad-images", type=non_negative_int, default=0, help="images that may be corrupt")
    group.add_argument("--verify", action="store_true", help="compare a complete cache with its checksums, and stop")
    return parser


def main():
    """Run the command."""
    flags, explicit_args = parse_args(
        build_parser(), lambda flags, explicit_args: BUILTIN_DATASETS["digits"] if flags.data_path == "digits" else {})
    check_flags(flags, explicit_args)
    distributed.init(tf32=flags.precision != "fp32", timeout=TIMEOUT)
    with distributed.collective_timeout("the latents", timeout=TIMEOUT):
        (verify_cache if flags.verify else extract)(flags)
    distributed.shutdown()


def check_flags(flags, explicit_args):
    """Raise an `ArgumentError` for flags that do not fit together."""
    check_num_workers(flags.num_workers)
    check_memory(100 * flags.num_classes, num_classes=flags.num_classes)  # their names
    check_memory(3 * 4 * flags.image_size**2, image_size=flags.image_size)
    if flags.verify:
        return
    if flags.data_path is None:
        raise ArgumentError("missing. Name the images (only --verify needs none)", data_path=None)
    if "num_classes" in explicit_args and parse_builtin_name(flags.data_path)[0] != "fractals":
        raise ArgumentError(f"only the fractals have a choice of classes, not {flags.data_path}. Leave it out",
                            num_classes=flags.num_classes)
    if flags.vae == "none":
        raise ArgumentError("without a VAE there is nothing to encode. train.py takes pixels as they are", vae="none")
    data_path, features_path = os.path.realpath(flags.data_path), os.path.realpath(flags.features_path)
    if not parse_builtin_name(flags.data_path)[0] and os.path.commonpath([features_path, data_path]) == data_path:
        raise ArgumentError("lies in --data-path, where it would be taken for a class. Name a folder elsewhere",
                            features_path=flags.features_path)


# ---------------------------------------------------------------- encoding

def extract(flags):
    """Encode the data set, or what an earlier run left of it."""
    dataset, autoencoder, writer = open_all(flags)
    distributed.assert_same_on_all_ranks(writer.manifest["vae_sha256"], "the weights of --vae")
    with ExitStack() as lock:
        ranges = distributed.run_on_rank0_and_broadcast(lambda: begin(dataset, autoencoder, writer, flags, lock))
        if ranges is None:
            return
        try:
            encode_all(dataset, autoencoder, writer, ranges, flags)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {flags.features_path} is kept; the same command resumes", file=sys.stderr)
            raise
        finish(dataset, writer, flags)


def open_all(flags):
    """Open the images, the autoencoder and the cache's writer, on all ranks together."""
    with distributed.raise_on_all_ranks():
        dataset = build_dataset(flags.data_path, flags.image_size, num_classes=flags.num_classes, collective=True)
    with distributed.raise_on_all_ranks():
        # The cache keeps the paths, and is used from elsewhere: `path_or_name` makes them absolute.
        data_path = flags.data_path if parse_builtin_name(flags.data_path)[0] else path_or_name(flags.data_path)
        autoencoder = load_autoencoder(path_or_name(flags.vae), dataset.channels, distributed.device())
        latent_size(autoencoder, flags.image_size)  # raises if they do not fit
        flips = dataset.flips if flags.flip is None else flags.flip
        manifest = new_manifest(dataset, data_path, autoencoder, flags.image_size, flips, flags.dtype, flags.precision)
        return dataset, autoencoder, LatentCacheWriter(flags.features_path, manifest)


def begin(dataset, autoencoder, writer, flags, lock):
    """Prepare the files on rank 0, and return the ranges (start, end) left to encode, or None if there are none.

    Until the end of the `ExitStack` `lock` no other run can write to the cache.
    """
    if writer.is_complete():
        return report_complete(writer)
    check_writable(flags.features_path, is_folder=True, features_path=flags.features_path)
    examples = dataset.examples(NUM_CHECK_IMAGES)
    for line in (*describe_dataset(dataset), *check_autoencoder(autoencoder, examples, distributed.device())):
        print(line)
    orientations, *shape = writer.layout.row_shape
    print(f"{flags.features_path}: {len(dataset):,} images{' and their mirror images' if orientations == 2 else ''}, "
          f"{'x'.join(map(str, shape))} {flags.dtype} each: {format_bytes(sum(writer.layout.sizes))}", flush=True)
    lock.enter_context(writer.locked())
    if writer.is_complete():  # another run finished it meanwhile
        return report_complete(writer)
    writer.prepare(dataset)
    ranges = writer.missing_ranges(flags.batch_size)
    num_done = len(dataset) - sum(end - start for start, end in ranges)
    if num_done:
        print(f"{num_done:,} images are there already", flush=True)
    return ranges


def encode_all(dataset, autoencoder, writer, ranges, flags):
    """Encode and write this rank's share of the ranges. An error ends the run at once, without asking other ranks."""
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    local_ranges, total = ranges[rank::world_size], sum(end - start for start, end in ranges)
    loader = DataLoader(ImageRanges(dataset), sampler=local_ranges, batch_size=None, num_workers=flags.num_workers,
                        pin_memory=device.type == "cuda")
    with progress_bar(total, "image") as bar, BackgroundWriter() as background:
        for (start, end), (images, corrupt) in zip(local_ranges, raise_worker_deaths(loader)):
            if corrupt:
                report_corrupt(start, corrupt, writer, flags.max_bad_images)
            moments = encode(autoencoder, images.to(device), writer.manifest["orientations"], flags)
            moments[list(corrupt)] = 0
            background.submit(writer.write, start, moments, [i in corrupt for i in range(end - start)])
            bar.update(min((end - start) * world_size, total - bar.n))


class ImageRanges(Dataset):
    """Ranges of a data set: (start, end) -> images (n, C, H, W), and {position: `CorruptImage`}."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        images = [self.dataset.read(index) for index in range(*key)]
        corrupt = {position: image for position, image in enumerate(images) if isinstance(image, CorruptImage)}
        blank = torch.zeros(self.dataset.channels, self.dataset.image_size, self.dataset.image_size)
        return torch.stack([blank if position in corrupt else image for position, image in enumerate(images)]), corrupt


def encode(autoencoder, images, orientations, flags):
    """Compute the moments of images (n, C, H, W) and of their mirror images: (n, orientations, 2C, h, w) on the CPU."""
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            moments = [autoencoder.moments(side) for side in (images, images.flip(-1))[:orientations]]
    except torch.OutOfMemoryError:
        raise ArgumentError(f"does not fit into the memory of {images.device}, at {flags.image_size} pixels a side. "
                            "Lower it", batch_size=flags.batch_size) from None
    return torch.stack(moments, dim=1).float().cpu()


def report_corrupt(start, corrupt, writer, max_bad_images):
    """Mark and print the corrupt images {position: `CorruptImage`} of a batch; raises if there are too many."""
    for image in corrupt.values():
        raise_if_unreadable(image)
    count = writer.mark_corrupt([start + position for position in corrupt])
    if count > max_bad_images:
        raise corrupt_image_error(next(iter(corrupt.values())), count, max_bad_images)
    for image in corrupt.values():
        tqdm.write(f"WARNING: skipped the image {image.path} ({image.reason})")
    tqdm.write(f"{count} of {max_bad_images} corrupt images that --max-bad-images allows")


def finish(dataset, writer, flags):
    """Wait for all ranks, compute the checksums together, and mark the cache as complete."""
    distributed.barrier()
    with distributed.raise_on_all_ranks():
        if ranges := writer.missing_ranges(len(dataset)):
            raise UserError(f"the images {ranges[0][0]} .. {ranges[0][1] - 1} were not written. Do all ranks write to "
                            "the same disk?")
        paths = {name: os.path.join(writer.folder, name)
                 for name in writer.file_names()[distributed.rank()::distributed.world_size()]}
        with progress_bar(sum(map(os.path.getsize, paths.values())), "B", unit_scale=True, desc="checksums") as bar:
            checksums = [(name, sha256_file(path, on_block=bar.update)) for name, path in paths.items()]
    checksums = dict(distributed.gather_objects(checksums))
    distributed.run_on_rank0_and_broadcast(lambda: writer.finish(dataset, checksums, flags.max_bad_images))
    if distributed.is_rank0():
        report_complete(writer)


def report_complete(writer):
    """Print that the cache is complete."""
    writer.remove_leftovers()
    num_corrupt = len(read_manifest(writer.folder)["bad_images"])
    skipped = f", {num_corrupt} of them corrupt and left out (bad_images of its manifest)" if num_corrupt else ""
    print(f"{writer.folder} is complete: {writer.layout.count:,} images{skipped}. --verify reads it back", flush=True)


# ---------------------------------------------------------------- verifying

def verify_cache(flags):
    """Compare every file of a cache with its checksum, the files shared between the ranks."""
    folder, rank, world_size = flags.features_path, distributed.rank(), distributed.world_size()
    with distributed.raise_on_all_ranks():
        manifest = read_manifest(folder)
        total = sum(file["bytes"] for file in manifest.get("files", {}).values())
        with progress_bar(total, "B", unit_scale=True) as bar:
            problems = verify(folder, rank, world_size, lambda size: bar.update(min(size * world_size, total - bar.n)))
    if problems := sorted(distributed.gather_objects(problems)):
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}. Copy these files again from an intact copy, or "
                        "remove the folder and encode again", shown=distributed.is_rank0())
    distributed.print_rank0(f"{folder} is as it was written: {manifest['count']:,} images, {format_bytes(total)} "
                            f"in {len(manifest['files'])} files")


def progress_bar(total, unit, **options):
    """Open a progress bar on rank 0; without a terminal it prints a line every 30 seconds."""
    return tqdm(total=total, unit=unit, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30,
                disable=not distributed.is_rank0(), **options)


if __name__ == "__main__":
    run_command(main)
