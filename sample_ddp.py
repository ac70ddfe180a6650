"""Sample a set of images for evaluation: an .npz for ADM's suite, made by any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-S-2/checkpoints/0002992.pt --num-fid-samples 500

Sample i is a function of (--global-seed, i): the number of processes and the batch size do not matter. A killed run
continues where it stopped.
"""
import common.startup  # noqa: F401

import argparse
import os
from contextlib import ExitStack

import torch
from tqdm.auto import tqdm

from common import distributed
from common.cli import HelpFormatter, add_alias, add_compute_flags, non_negative_int, parse_args, positive_int
from common.errors import run_command
from common.files import BackgroundWriter, check_writable, sha256_weights
from common.provenance import collect_environment
from common.resources import check_disk, check_memory, sampling_bytes
from data.image_io import to_uint8
from sampling.cli import add_model_flags, add_sampling_flags, load_pipeline
from sampling.noise import PerSampleRNG
from sampling.sample_set import LABEL_DISTRIBUTIONS, SampleSet, describe_sample_set, sample_labels


def build_parser():
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser, vae="ema")
    add_sampling_flags(parser, cfg_scale=1.5)
    add_compute_flags(parser)
    group = parser.add_argument_group("set")
    group.add_argument("--sample-dir", default="samples", help="folder of the .npz")
    group.add_argument("--num-fid-samples", type=positive_int, default=50000, help="number of images")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="batch size per process")
    group.add_argument("--label-distribution", choices=LABEL_DISTRIBUTIONS, default="uniform",
                       help="random classes (as published), or the same number of images of each")
    add_alias(group, "--labels", "--label-distribution")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="random seed of labels and noise")
    group.add_argument("--png", action="store_true", help="a PNG of every image, in addition")
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products")
    return parser


def main():
    """Load the model and make the set; no other command may make it at the same time."""
    flags, explicit_args = parse_args(build_parser())
    device = distributed.init(tf32=flags.tf32 and flags.precision != "fp32")
    with distributed.raise_on_all_ranks():
        loaded, pipeline = load_pipeline(flags, explicit_args, device, distributed.print_rank0)
        check_writable(flags.sample_dir, is_folder=True, sample_dir=flags.sample_dir)
        batch = min(flags.per_proc_batch_size, flags.num_fid_samples)
        check_memory(sampling_bytes(loaded.model, batch, loaded.image_size), device,
                     per_proc_batch_size=flags.per_proc_batch_size)
        samples = SampleSet(os.path.join(flags.sample_dir, folder_name(loaded, pipeline, flags)))
        samples.open()
    with ExitStack() as stack:
        with distributed.raise_on_all_ranks():
            if distributed.is_rank0():
                stack.enter_context(samples.locked())
                samples.verify()
                if samples.num_finished() < flags.num_fid_samples:  # else nothing is written
                    check_disk(3 * flags.num_fid_samples * loaded.image_size**2, flags.sample_dir,
                               num_fid_samples=flags.num_fid_samples)
        make_samples(samples, loaded, pipeline, flags, device)
    distributed.shutdown()


def make_samples(samples, loaded, pipeline, flags, device):
    """Sample the missing images of the set in parts, and assemble its .npz. Called by all ranks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    num_samples = flags.num_fid_samples
    ranges = distributed.run_on_rank0_and_broadcast(lambda: samples.missing(num_samples, flags.per_proc_batch_size))
    num_missing = sum(end - start for start, end in ranges)
    distributed.print_rank0(f"{samples.npz}: {num_samples - num_missing} of {num_samples} samples are there")
    bar = tqdm(total=num_missing, unit="image", dynamic_ncols=True, disable=not distributed.is_rank0())
    with distributed.raise_on_all_ranks(), BackgroundWriter() as writer:  # writes a batch while the next one is made
        for start, end in ranges[rank::world_size]:
            labels = sample_labels(flags.label_distribution, flags.global_seed, range(start, end), loaded.num_classes)
            noise = PerSampleRNG(flags.global_seed, range(start, end), device)
            images = pipeline(dict(y=torch.from_numpy(labels).to(device)), noise)
            writer.submit(samples.add, start, to_uint8(images).cpu().numpy(), labels, flags.png)
            bar.update(min((end - start) * world_size, bar.total - bar.n))
    bar.close()

    def finish():
        count = samples.assemble(num_samples)
        metadata = loaded.metadata() | (collect_environment(device) if num_missing else {})  # else it is unknown
        samples.write_metadata(
            describe_sample_set(pipeline, count, flags.global_seed, flags.label_distribution, metadata))
        return count

    count = distributed.run_on_rank0_and_broadcast(finish)
    if flags.png:
        with distributed.raise_on_all_ranks():
            samples.write_pngs(num_samples, rank, world_size)
    larger = f"; the first {num_samples} are those of this command" if count > num_samples else ""
    distributed.print_rank0(f"{samples.npz} holds {count} images (arr_0) and labels (arr_1){larger}; their metadata is "
                            f"in {os.path.basename(samples.folder)}.json")


def folder_name(loaded, pipeline, flags):
    """Return a name with everything in it that changes the images."""
    checkpoint = os.path.splitext(os.path.basename(loaded.path))[0]
    vae = os.path.basename(os.path.normpath(loaded.autoencoder.name))
    modules = [module for module in (loaded.model, getattr(loaded.autoencoder, "vae", None)) if module is not None]
    precision = pipeline.compute.precision if flags.tf32 or pipeline.compute.precision == "bf16" else "fp32"
    parts = [loaded.name.replace("/", "-"), checkpoint, sha256_weights(*modules)[:8], f"size-{loaded.image_size}",
             f"vae-{vae}", f"cfg-{flags.cfg_scale:g}", f"channels-{pipeline.cfg_channels}",
             f"{pipeline.sampler}-{flags.num_sampling_steps}",
             pipeline.cfg_interval and "interval-{}-{}".format(*pipeline.cfg_interval),
             flags.eta and f"eta-{flags.eta:g}",
             flags.label_distribution != "uniform" and f"labels-{flags.label_distribution}",
             f"seed-{flags.global_seed}", precision != "tf32" and precision]
    return "-".join(filter(None, parts))


if __name__ == "__main__":
    run_command(main)
