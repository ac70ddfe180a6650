"""Encode a data set by a VAE once, and train from the cache ever after: train.py --features-path.

    torchrun --nproc_per_node=8 extract_features.py --data-path /data/imagenet/train --features-path /data/latents-256
    python extract_features.py --features-path /data/latents-256 --verify

Kept are the posterior's mean and log-variance of each image and of its mirror image, so that training draws flips and
samples anew in every epoch, as it does from the images. Killed, it goes on where it was. See docs/latents.md.
"""
import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from autoencoder.checks import NUM_CHECK_IMAGES, check_autoencoder
from autoencoder.vae import latent_size, load_autoencoder
from common import distributed
from common.cli import HelpFormatter, non_negative_int, parse_args, positive_int
from common.errors import UserError, run_command
from common.files import format_bytes, sha256_file
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.corrupt_images import CorruptImage, raise_if_unreadable, too_many_corrupt
from data.digits import DigitsDataset
from data.latent_cache.manifest import DTYPES, new_manifest, read_manifest
from data.latent_cache.reader import describe_incomplete_cache, verify
from data.latent_cache.writer import LatentCacheWriter


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--data-path", help="folder with a folder of images a class, or: digits, fractals")
    group.add_argument("--features-path", required=True, help="the cache's folder")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--num-classes", type=positive_int, default=BUILTIN_DATASETS["fractals"]["num_classes"],
                       help="of fractals; other data have what they have")
    group.add_argument("--vae", default="ema", help="ema, mse, a diffusers directory or hub name")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="also the mirror images (not of digits and fractals)")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="of what is stored")
    group = parser.add_argument_group("how")
    group.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="tf32",
                       help="of the encoder; tf32: as train.py encodes (fp32, with TF32 products on GPUs)")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images at once, a process")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes that load images, each")
    group.add_argument("--max-bad-images", type=non_negative_int, default=0, help="so many may be unreadable")
    group.add_argument("--verify", action="store_true", help="read a cache back and compare it with its checksums")
    return parser


def main():
    flags, given = parse_args(build_parser())
    if flags.data_path is None and not flags.verify:
        raise UserError("--data-path is missing: which images? (--verify alone needs none)")
    if "num_classes" in given and parse_builtin_name(flags.data_path)[0] != "fractals":
        raise UserError(f"--num-classes {flags.num_classes} is for --data-path fractals, not {flags.data_path}")
    if flags.data_path == "digits" and "image_size" not in given:
        flags.image_size = DigitsDataset.image_size
    if os.path.isdir(flags.vae):
        flags.vae = os.path.abspath(flags.vae)  # the cache keeps it, and is used from elsewhere
    # Shares may take hours more on one process than on another; one that dies is noticed all the same.
    distributed.init(tf32=flags.precision != "fp32", timeout=7 * 24 * 60)
    with distributed.collective_timeout("the latents", timeout=7 * 24 * 60):
        (verify_cache if flags.verify else extract)(flags)
    distributed.shutdown()


def extract(flags):
    with distributed.raise_on_all_ranks():
        images, autoencoder, writer = open_all(flags, distributed.device())
    distributed.assert_same_on_all_ranks(writer.manifest["listing_sha256"], "the images of --data-path")
    distributed.assert_same_on_all_ranks(writer.manifest["vae_sha256"], "the weights of --vae")
    with ExitStack() as lock:
        left = distributed.run_on_rank0_and_broadcast(lambda: begin(images, autoencoder, writer, flags, distributed.device(), lock))
        if left is None:
            return
        try:
            encode_all(images, autoencoder, writer, left, flags)
        except KeyboardInterrupt:
            print(f"\ninterrupted: what is in {flags.features_path} stays; the same command goes on", file=sys.stderr)
            raise
        finish(images, writer, flags)


def encode_all(images, autoencoder, writer, left, flags):
    """Encode and write this process' share of the ranges `left`."""
    rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
    own, total = left[rank::world], sum(end - first for first, end in left)
    loader = DataLoader(ImagesInOrder(images), sampler=own, batch_size=None, num_workers=flags.num_workers,
                        pin_memory=device.type == "cuda", prefetch_factor=2 if flags.num_workers else None)
    # Not `raise_on_all_ranks`: who meets an error ends the run at once, not when all the others are through.
    # The thread writes one batch while the next is being encoded.
    with progress_bar(total, "image") as bar, ThreadPoolExecutor(1) as disk:
        written = disk.submit(lambda: None)
        for (first, end), (pixels, bad) in zip(own, loader):
            if bad:
                check_bad(first, bad, writer, flags.max_bad_images)
            moments = encode(autoencoder, pixels.to(device), writer.manifest["orientations"], flags)
            moments[list(bad)] = 0
            written.result()
            written = disk.submit(writer.write, first, moments, [i in bad for i in range(end - first)])
            bar.update(min((end - first) * world, total - bar.n))
        written.result()


def progress_bar(total, unit, **more):
    """A bar on the main process; where nobody watches, a line of it now and then."""
    return tqdm(total=total, unit=unit, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30,
                disable=not distributed.is_rank0(), **more)


class ImagesInOrder(Dataset):
    """Ranges of an `LabeledImageDataset`, for a loader: (first, end) -> pixels (n, C, H, W), and {place: `CorruptImage`} in them."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, key):
        read = [self.images.read(index) for index in range(*key)]
        bad = {place: image for place, image in enumerate(read) if isinstance(image, CorruptImage)}
        blank = torch.zeros(self.images.channels, self.images.image_size, self.images.image_size)
        return torch.stack([blank if place in bad else image for place, image in enumerate(read)]), bad


def open_all(flags, device):
    """The images, the codec and the writer of the cache; a `UserError` where they do not fit each other."""
    images = build_dataset(flags.data_path, flags.image_size, num_classes=flags.num_classes)
    autoencoder = load_autoencoder(flags.vae, images.channels, device)
    if not autoencoder.is_random:
        raise UserError("--vae none: without a VAE there is nothing to encode; train.py takes the pixels themselves")
    latent_size(autoencoder, flags.image_size)
    flips = images.flips if flags.flip is None else flags.flip
    data_path = flags.data_path
    if not parse_builtin_name(data_path)[0]:
        data_path = os.path.abspath(data_path)
        if os.path.commonpath([os.path.abspath(flags.features_path), data_path]) == data_path:
            raise UserError(f"--features-path {flags.features_path} lies in --data-path, where it would be taken for a "
                            "class: name a folder elsewhere")
    manifest = new_manifest(images, data_path, autoencoder, flags.image_size, flips, flags.dtype,
                                         flags.precision)
    return images, autoencoder, LatentCacheWriter(flags.features_path, manifest)


def begin(images, autoencoder, writer, flags, device, lock):
    """Say what will be done, on one process; returns the ranges that are left, or None: the cache is complete.

    lock  an `ExitStack`, until whose end no other run may write to the cache
    """
    if writer.is_complete():
        return report_complete(writer)
    for line in check_autoencoder(autoencoder, images.examples(NUM_CHECK_IMAGES), device):
        print(line)
    layout, size = writer.layout, format_bytes(sum(writer.layout.sizes))
    mirrored = " and their mirror images" if layout.row_shape[0] == 2 else ""
    print(f"{flags.features_path}: {len(images):,} images{mirrored}, {'x'.join(map(str, layout.row_shape[1:]))} "
          f"{flags.dtype} each: {size}", flush=True)
    lock.enter_context(writer.locked())
    if writer.is_complete():  # another run was at it meanwhile
        return report_complete(writer)
    writer.prepare(images)
    left = writer.missing(flags.batch_size)
    done = len(images) - sum(end - first for first, end in left)
    if done:
        print(f"{done:,} images are there already", flush=True)
    return left


def report_complete(writer):
    writer.clean()
    bad = len(read_manifest(writer.folder)["bad_images"])
    skipped = f", {bad} of them unreadable and left out (bad_images of its manifest)" if bad else ""
    print(f"{writer.folder} is complete: {writer.layout.count:,} images{skipped}. --verify reads it back", flush=True)


def check_bad(first, bad, writer, limit):
    """Count and name the images of a batch that cannot be read; a `UserError` where they are too many.

    first, bad  the batch's first index, and {place in it: `CorruptImage`}
    """
    for image in bad.values():
        raise_if_unreadable(image)
    count = writer.mark_bad([first + place for place in bad])
    if count > limit:
        raise UserError(too_many_corrupt(next(iter(bad.values())), count, limit))
    for image in bad.values():
        tqdm.write(f"WARNING: skipped the image {image.path} ({image.reason})")
    tqdm.write(f"{count} of {limit} unreadable images that --max-bad-images allows")


def encode(autoencoder, pixels, orientations, flags):
    """Moments of images (n, C, H, W) and of their mirror images: (n, orientations, 2C, h, w) on the CPU."""
    try:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            sides = [autoencoder.moments(side) for side in (pixels, pixels.flip(-1))[:orientations]]
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {flags.batch_size} does not fit into the memory of {pixels.device} at "
                        f"--image-size {flags.image_size}: make it smaller") from None
    return torch.stack(sides, dim=1).float().cpu()


def finish(images, writer, flags):
    """Wait for all, take the checksums together, and declare the cache complete."""
    distributed.barrier()
    with distributed.raise_on_all_ranks():
        if left := writer.missing(len(images)):
            raise UserError(f"the images {left[0][0]} .. {left[0][1] - 1} were not written: do all processes write to "
                            "the same disk?")
        own = writer.file_names()[distributed.rank()::distributed.world_size()]
        paths = [os.path.join(writer.folder, name) for name in own]
        with progress_bar(sum(map(os.path.getsize, paths)), "B", unit_scale=True, desc="checksums") as bar:
            sums = [(name, sha256_file(path, on_block=bar.update)) for name, path in zip(own, paths)]
    if distributed.world_size() > 1:
        sums = distributed.gather_objects(sums)
    distributed.run_on_rank0_and_broadcast(lambda: writer.finish(images, dict(sums), flags.max_bad_images))
    if distributed.is_rank0():
        report_complete(writer)


def verify_cache(flags):
    """Compare every file of a cache with its checksum, the files shared between the processes."""
    folder, rank, world = flags.features_path, distributed.rank(), distributed.world_size()
    with distributed.raise_on_all_ranks():
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise UserError(describe_incomplete_cache(folder, manifest))
        total = sum(file["bytes"] for file in manifest["files"].values())
        with progress_bar(total, "B", unit_scale=True) as bar:
            show = lambda size: bar.update(min(size * world, total - bar.n))  # noqa: E731
            faults = verify(folder, rank, world, show)
    if world > 1:
        faults = sorted(distributed.gather_objects(faults))
    if faults:
        raise UserError(f"{folder} is damaged: {'; '.join(faults)}. Copy these files anew from where they are whole, "
                        "or remove the folder and encode again", shown=distributed.is_rank0())
    distributed.print_rank0(f"{folder} is as it was written: {manifest['count']:,} images, {format_bytes(total)} "
                      f"in {len(manifest['files'])} files")


if __name__ == "__main__":
    run_command(main)
