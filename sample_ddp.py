"""Make a set of samples for evaluation: an .npz as ADM's suite takes it, by any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-S-2/checkpoints/0002992.pt --num-fid-samples 500

Sample i is a function of (--global-seed, i): processes and batch size do not matter. Killed, it goes on where it was.
"""
import argparse
import os

import torch
from tqdm.auto import tqdm

from common import distributed
from common.cli import (
    HelpFormatter,
    add_compute_flags,
    build_compute_config,
    non_negative_int,
    parse_args,
    positive_int,
)
from common.errors import run_command
from common.files import BackgroundWriter, sha256_weights
from common.provenance import collect_environment
from data.image_io import to_uint8
from sampling.cli import add_model_flags, add_sampling_flags, sampling_options
from sampling.load_model import load_model
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline
from sampling.sample_set import SampleSet, describe_sample_set, sample_labels


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser, vae="ema")
    add_sampling_flags(parser, cfg_scale=1.5)
    add_compute_flags(parser)
    group = parser.add_argument_group("set")
    group.add_argument("--sample-dir", default="samples", help="where the .npz goes")
    group.add_argument("--num-fid-samples", type=positive_int, default=50000, help="size of the set")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at once")
    group.add_argument("--labels", choices=["uniform", "balanced"], default="uniform",
                       help="random classes (as published), or as many of each")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="of labels and noise")
    group.add_argument("--png", action="store_true", help="also write every image as a PNG")
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products")
    return parser


def main():
    flags, given = parse_args(build_parser())
    device = distributed.init(tf32=flags.tf32 and flags.precision != "fp32")
    device, rank, world = distributed.device(), distributed.rank(), distributed.world_size()
    with distributed.raise_on_all_ranks():
        trained = load_model(flags.ckpt, flags.model, flags.image_size, flags.num_classes, flags.vae, given, device)
        make = build_pipeline(trained.model, trained.autoencoder, **sampling_options(flags),
                           compute=build_compute_config(flags, device, distributed.print_rank0))
        samples = SampleSet(os.path.join(flags.sample_dir, folder_name(trained, make, flags)))
        samples.open()
    distributed.print_rank0(trained.description())

    todo = distributed.run_on_rank0_and_broadcast(lambda: samples.missing(flags.num_fid_samples, flags.per_proc_batch_size))
    left = sum(end - first for first, end in todo)
    distributed.print_rank0(f"{samples.npz}: {flags.num_fid_samples - left} of {flags.num_fid_samples} samples are there")
    bar = tqdm(total=left, unit="image", dynamic_ncols=True, disable=not distributed.is_rank0())
    with distributed.raise_on_all_ranks(), BackgroundWriter() as writer:  # which writes a batch while the next one is made
        for first, end in todo[rank::world]:
            labels = sample_labels(flags.labels, flags.global_seed, range(first, end), trained.num_classes)
            noise = PerSampleRNG(flags.global_seed, range(first, end), device)
            images = make(torch.from_numpy(labels).to(device), noise)
            writer.submit(samples.add, first, to_uint8(images).cpu().numpy(), labels, flags.png)
            bar.update(min((end - first) * world, bar.total - bar.n))
    bar.close()

    count = distributed.run_on_rank0_and_broadcast(lambda: samples.assemble(flags.num_fid_samples))
    made_by = collect_environment(device) if left else {}  # of a set that was there already, who knows by what
    distributed.run_on_rank0_and_broadcast(lambda: samples.describe(describe_sample_set(
        make, count, flags.global_seed, flags.labels, trained.metadata() | made_by)))
    if flags.png:
        with distributed.raise_on_all_ranks():
            samples.write_pngs(flags.num_fid_samples, rank, world)
    more = f"; the first {flags.num_fid_samples} are those asked for" if count > flags.num_fid_samples else ""
    distributed.print_rank0(f"{samples.npz} holds {count} images (arr_0) and labels (arr_1){more}; how they were made is in "
                      f"{os.path.basename(samples.folder)}.json")
    distributed.shutdown()


def folder_name(trained, make, flags):
    """A name with everything in it that changes the images."""
    name = os.path.splitext(os.path.basename(trained.path))[0]
    vae = os.path.basename(os.path.normpath(trained.autoencoder.name))
    modules = [module for module in (trained.model, getattr(trained.autoencoder, "vae", None)) if module is not None]
    parts = [trained.name.replace("/", "-"), name, sha256_weights(*modules)[:8], f"size-{trained.image_size}",
             f"vae-{vae}", f"cfg-{flags.cfg_scale:g}", f"channels-{make.cfg_channels}",
             f"{make.sampler}-{flags.num_sampling_steps}"]
    parts += [f"interval-{make.cfg_interval[0]}-{make.cfg_interval[1]}"] if make.cfg_interval else []
    parts += [f"eta-{flags.eta:g}"] if flags.eta else []
    parts += [f"labels-{flags.labels}"] if flags.labels != "uniform" else []
    parts += [f"seed-{flags.global_seed}"] + ([] if flags.tf32 and make.compute.precision == "tf32" else [
        "fp32" if make.compute.precision == "tf32" else make.compute.precision])
    return "-".join(parts)


if __name__ == "__main__":
    run_command(main)
