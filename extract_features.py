"""Encode a data set by a VAE once, and train from the cache ever after: train.py --features-path.

    torchrun --nproc_per_node=8 extract_features.py --data-path /data/imagenet/train --features-path /data/latents-256
    python extract_features.py --features-path /data/latents-256 --verify

Kept are the posterior's mean and log-variance of each image and of its mirror image, so that training draws flips and
samples anew in every epoch, as it does from the images. Killed, it goes on where it was. See docs/latents.md.
"""
import argparse
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from runtime import checksum, data, latent_cache, latents, processes
from runtime.errors import UserError, run_command
from runtime.flags import HelpFormatter, non_negative_int, parse, positive_int
from runtime.images import BadImage


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("what")
    group.add_argument("--data-path", help="folder with a folder of images a class")
    group.add_argument("--features-path", required=True, help="the cache's folder")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels")
    group.add_argument("--vae", default="ema", help="ema, mse, a diffusers directory or hub name")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="also the mirror images (not digits)")
    group.add_argument("--dtype", choices=latent_cache.DTYPES, default="fp16", help="of what is stored")
    group = parser.add_argument_group("how")
    group.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="tf32",
                       help="of the encoder; tf32: as train.py encodes (fp32, with TF32 products on GPUs)")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images at once, a process")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes that load images, each")
    group.add_argument("--max-bad-images", type=non_negative_int, default=0, help="so many may be unreadable")
    group.add_argument("--verify", action="store_true", help="read a cache back and compare it with its checksums")
    return parser


def main():
    flags, _ = parse(build_parser())
    if flags.data_path is None and not flags.verify:
        raise UserError("--data-path is missing: which images? (--verify alone needs none)")
    if os.path.isdir(flags.vae):
        flags.vae = os.path.abspath(flags.vae)  # the cache keeps it, and is used from elsewhere
    accelerator = processes.start(tf32=flags.precision != "fp32")
    (verify if flags.verify else extract)(accelerator, flags)
    accelerator.end_training()


def extract(accelerator, flags):
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with processes.together(accelerator):
        images, codec, writer = open_all(flags, device)
    left = processes.on_main(accelerator, lambda: begin(images, codec, writer, flags, device))
    if left is None:
        return
    own = left[rank::world]
    bar = tqdm(total=sum(end - first for first, end in left), unit="image", dynamic_ncols=True,
               disable=not accelerator.is_main_process)
    loader = DataLoader(ImagesInOrder(images), sampler=own, batch_size=None, num_workers=flags.num_workers,
                        pin_memory=device.type == "cuda", prefetch_factor=2 if flags.num_workers else None)
    # Not `together`: who meets an error ends the run at once, not when all the others are through.
    with ThreadPoolExecutor(1) as disk:  # writes one batch while the next is being encoded
        written = disk.submit(lambda: None)
        for (first, end), (pixels, bad) in zip(own, loader):
            if bad:
                written.result()  # so that all bad ones before these are counted
                check_bad(bad, writer, flags.max_bad_images)
            moments = encode(codec, pixels.to(device), writer.manifest["orientations"], flags)
            moments[list(bad)] = 0
            written.result()
            written = disk.submit(writer.write, first, moments, [i in bad for i in range(end - first)])
            bar.update(min((end - first) * world, bar.total - bar.n))
        written.result()
    bar.close()
    finish(accelerator, images, writer)


class ImagesInOrder(Dataset):
    """Ranges of an `ImageData`, for a loader: (first, end) -> pixels (n, C, H, W), and {place: `BadImage`} in them."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, key):
        read = [self.images.read(index) for index in range(*key)]
        bad = {place: image for place, image in enumerate(read) if isinstance(image, BadImage)}
        blank = torch.zeros(self.images.channels, self.images.image_size, self.images.image_size)
        return torch.stack([blank if place in bad else image for place, image in enumerate(read)]), bad


def open_all(flags, device):
    """The images, the codec and the writer of the cache; a `UserError` where they do not fit each other."""
    images = data.open_data(flags.data_path, flags.image_size)
    codec = latents.open_codec(flags.vae, images.channels, device)
    if not codec.is_random:
        raise UserError("--vae none: without a VAE there is nothing to encode; train.py takes the pixels themselves")
    latents.latent_size(codec, flags.image_size)
    flips = images.flips if flags.flip is None else flags.flip
    data_path = flags.data_path if flags.data_path == "digits" else os.path.abspath(flags.data_path)
    manifest = latent_cache.new_manifest(images, data_path, codec, flags.image_size, flips, flags.dtype,
                                         flags.precision)
    return images, codec, latent_cache.CacheWriter(flags.features_path, manifest)


def begin(images, codec, writer, flags, device):
    """Say what will be done, on one process; returns the ranges that are left, or None: the cache is complete."""
    if writer.is_complete():
        writer.clean()
        print(f"{flags.features_path} is complete: {len(images):,} images. --verify compares it with its checksums")
        return None
    for line in latents.first_look(codec, images.examples(latents.LOOKED_AT), device):
        print(line)
    layout, size = writer.layout, latent_cache.gigabytes(sum(writer.layout.sizes))
    print(f"{flags.features_path}: {len(images):,} images in {layout.row_shape[0]} orientation(s) of "
          f"{'x'.join(map(str, layout.row_shape[1:]))} {flags.dtype}: {size} in "
          f"{len(layout.names)} file(s)", flush=True)
    writer.prepare(images)
    left = writer.missing(flags.batch_size)
    done = len(images) - sum(end - first for first, end in left)
    if done:
        print(f"{done:,} images are there already", flush=True)
    return left


def check_bad(bad, writer, limit):
    """Name the images of a batch that cannot be read; a `UserError` where they are too many."""
    for image in bad.values():
        data.check_readable(image)
    met = int((writer.progress() == latent_cache.BAD).sum())
    for count, image in enumerate(bad.values(), start=met + 1):
        if count > limit:
            raise UserError(data.too_many(image, count, limit))
        print(f"WARNING: skipped the image {image.path} ({image.reason}), {count} of {limit} that --max-bad-images "
              "allows", flush=True)


def encode(codec, pixels, orientations, flags):
    """Moments of images (n, C, H, W) and of their mirror images: (n, orientations, 2C, h, w) on the CPU."""
    try:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=flags.precision == "bf16"):
            sides = [codec.moments(side) for side in (pixels, pixels.flip(-1))[:orientations]]
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {flags.batch_size} does not fit into the memory of {pixels.device} at "
                        f"--image-size {flags.image_size}: make it smaller") from None
    return torch.stack(sides, dim=1).float().cpu()


def finish(accelerator, images, writer):
    """Wait for all, take the checksums together, and declare the cache complete."""
    with processes.together(accelerator):
        pass
    left = processes.on_main(accelerator, lambda: writer.missing(len(images)))
    if left:
        raise UserError(f"the images {left[0][0]} .. {left[0][1] - 1} were not written: do all processes write to the "
                        "same disk?", shown=accelerator.is_main_process)
    with processes.together(accelerator):
        own = writer.file_names()[accelerator.process_index::accelerator.num_processes]
        sums = [(name, checksum.of_file(os.path.join(writer.folder, name))) for name in own]
    if accelerator.num_processes > 1:
        sums = gather_object(sums)
    bad = processes.on_main(accelerator, lambda: writer.finish(images, dict(sums)))
    skipped = f", {bad} of them unreadable and left out (named in its manifest)" if bad else ""
    accelerator.print(f"{writer.folder} is complete: {len(images):,} images{skipped}")


def verify(accelerator, flags):
    """Compare every file of a cache with its checksum, the files shared between the processes."""
    with processes.together(accelerator):
        manifest = latent_cache.read_manifest(flags.features_path)
        total = sum(file["bytes"] for file in manifest["files"].values()) if manifest["complete"] else 0
        rank, world = accelerator.process_index, accelerator.num_processes
        with tqdm(total=total, unit="B", unit_scale=True, disable=not accelerator.is_main_process) as bar:
            faults = latent_cache.verify(flags.features_path, rank, world,
                                         show=lambda size: bar.update(min(size * world, total - bar.n)))
    if world > 1:
        faults = sorted(gather_object(faults))
    if faults:
        raise UserError(f"{flags.features_path} is damaged: {'; '.join(faults)}", shown=accelerator.is_main_process)
    accelerator.print(f"{flags.features_path} is as it was written: {manifest['count']:,} images, "
                      f"{latent_cache.gigabytes(total)} in {len(manifest['files'])} files")


if __name__ == "__main__":
    run_command(main)
