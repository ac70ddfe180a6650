"""Measure samples: FID, sFID, Inception Score, precision and recall, as ADM's suite computes them.

    python evaluate.py samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py DiT-XL-2-256x256.pt --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --make-reference /path/to/images --image-size 256 --output reference.npz
    python evaluate.py results/000-DiT-S-2/checkpoints/0002992.pt --nll digits-held-out
    python evaluate.py --diff A.scores.json B.scores.json

SAMPLES is an .npz, a folder of images, digits, fractals, one of these with -held-out, or a checkpoint, of which images
are then made and measured in one go, those that sample_ddp.py makes. Every score is written down with all that it
depends on.
"""
import argparse
import os

from common import distributed
from common.cli import (
    HelpFormatter,
    add_compute_flags,
    build_compute_config,
    minutes,
    non_negative_int,
    parse_args,
    positive_int,
)
from common.errors import UserError, run_command
from common.provenance import collect_environment
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from evaluation.feature_statistics import compute_statistics
from evaluation.features import add_feature_flags, load_feature_space
from evaluation.image_sources import GeneratedImages, open_image_source
from evaluation.nll import bits_per_dimension, plot_nll, summarize_nll
from evaluation.records import diff_records, free_path, read_record, write_record
from evaluation.reference import PRECISION_IMAGES, open_reference, save_reference
from evaluation.scores import check_comparable, compute_scores, distance_name, format_scores
from sampling.cli import add_model_flags, add_sampling_flags, sampling_options
from sampling.load_model import PUBLISHED_CHECKPOINTS, load_model
from sampling.pipeline import build_pipeline


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help="an .npz, a folder, or a checkpoint")
    group = parser.add_argument_group("what to do")
    group.add_argument("--reference", metavar="REF", help="ADM's .npz, an .npz of images, a folder, or a file of "
                                                          "--make-reference: what SAMPLES are compared with")
    group.add_argument("--make-reference", metavar="DATA", help="measure these images, to compare with them later")
    group.add_argument("--nll", metavar="DATA", help="bits per dimension of a checkpoint on these images: a folder "
                                                     "with a folder a class, digits-held-out, ...")
    group.add_argument("--diff", nargs=2, metavar=("A", "B"), help="say in what two records differ")
    group.add_argument("--output", metavar="FILE", help="the record, or the reference; default: beside SAMPLES")
    add_feature_flags(parser)
    add_model_flags(parser, vae="ema", ckpt=False)
    add_sampling_flags(parser, cfg_scale=1.5)
    add_compute_flags(parser)
    group = parser.add_argument_group("set")
    group.add_argument("--num-fid-samples", type=positive_int, default=50000, help="images made of a checkpoint")
    group.add_argument("--nll-images", type=positive_int, default=1000, help="images of --nll; 1000 passes each")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at once")
    group.add_argument("--labels", choices=["uniform", "balanced"], default="uniform",
                       help="random classes (as published), or as many of each")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="of labels and noise")
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="TF32 matrix products in the model (never in the features)")
    group.add_argument("--timeout", type=minutes, default=distributed.DEFAULT_TIMEOUT, metavar="MINUTES",
                       help="how long a process waits for the others")
    return parser


def main():
    flags, given = parse_args(build_parser())
    check(flags, given)
    if flags.diff:
        return show_differences(*flags.diff)
    distributed.init(flags.tf32 and flags.precision != "fp32", flags.timeout)
    with distributed.collective_timeout("the evaluation", flags.timeout):
        if flags.make_reference:
            make_reference(flags, given)
        elif flags.nll:
            evaluate_likelihood(flags, given)
        else:
            evaluate(flags, given)
    distributed.shutdown()


# What says how a checkpoint's images are made: without a meaning for images that are there already.
MAKING = {"num_fid_samples", "labels", "global_seed", "cfg_scale", "cfg_channels", "num_sampling_steps", "sampler",
          "cfg_interval", "eta", "model", "num_classes", "vae", "fast", "precision", "compile", "cuda_graphs",
          "attention"}


def check(flags, given):
    """Is it clear what is asked for?"""
    asked = [name for name in ("reference", "make_reference", "nll", "diff") if getattr(flags, name)]
    if len(asked) != 1:
        raise UserError("pass one of --reference, --make-reference, --nll and --diff, not "
                        + (" and ".join("--" + name.replace("_", "-") for name in asked) or "none"))
    (asked,) = asked
    if (flags.samples is None) != (asked in ("make_reference", "diff")):
        raise UserError(f"--{asked.replace('_', '-')} " + (
            "needs SAMPLES: an .npz, a folder, or a checkpoint" if flags.samples is None
            else f"takes no SAMPLES, here are {flags.samples}"))
    fractals = "fractals" in (parse_builtin_name(flags.samples)[0], parse_builtin_name(flags.reference)[0])
    making = given & MAKING - ({"num_classes"} if fractals else set())
    if flags.samples and asked == "reference" and not is_checkpoint(flags.samples) and making:
        name = sorted(making)[0].replace("_", "-")
        raise UserError(f"--{name} says how a checkpoint's images are made; those of {flags.samples} are there already")
    making = given & MAKING - {"global_seed", "model", "num_classes", "vae"}
    if asked == "nll" and making:
        raise UserError(f"--{sorted(making)[0].replace('_', '-')} says how images are made, and --nll makes none")
    if asked == "nll" and not is_checkpoint(flags.samples):
        raise UserError(f"--nll is of a checkpoint (.pt, .safetensors); {flags.samples} is none")
    if asked == "make_reference" and not flags.output:
        raise UserError("--make-reference needs --output: where the reference goes")
    if flags.output:
        check_output(flags)


def check_output(flags):
    """Is --output a file that may be written?"""
    ending = ".npz" if flags.make_reference else ".json"
    if not flags.output.endswith(ending):
        raise UserError(f"--output {flags.output}: its name must end in {ending}")
    for name in (flags.samples, flags.reference, flags.make_reference):
        if name and os.path.abspath(name) == os.path.abspath(flags.output):
            raise UserError(f"--output {flags.output} would overwrite what is to be measured")
    folder = os.path.dirname(os.path.abspath(flags.output))
    if not os.path.isdir(folder):
        raise UserError(f"--output {flags.output}: there is no folder {folder}")


def evaluate(flags, given):
    """Samples against a reference: prints the scores, and writes their record."""
    with distributed.raise_on_all_ranks():
        features = load_feature_space(flags.features, distributed.device(), flags.inception)
        images, image_size, num_classes = open_samples(flags, given)
    reference, reference_record = open_reference(flags.reference, features, flags.per_proc_batch_size,
                                                 image_size, num_classes)
    with distributed.raise_on_all_ranks():
        check_comparable(images, reference, features)
    samples = compute_statistics(images, features, flags.per_proc_batch_size, title="samples")

    def report():
        found = compute_scores(samples, reference, features, images.class_labels())
        for line in format_scores(found, features, samples, reference):
            print(line)
        record = dict(scores=found, name=distance_name(features, samples.count), features=features.metadata(),
                      samples=images.metadata() | (dict(pixels_sha256=samples.pixels) if samples.pixels else {}),
                      reference=reference_record, evaluated=collect_environment(distributed.device()) | dict(tf32=False))
        path = flags.output or free_path(stem_of(flags.samples) + ".scores", ".json")
        write_record(path, record)
        print(f"wrote {path}")

    distributed.run_on_rank0_and_broadcast(report)


def open_samples(flags, given):
    """The images that SAMPLES names, their size in pixels, and of how many classes they are, if that is known."""
    if not is_checkpoint(flags.samples):
        images = open_image_source(flags.samples, **typed(flags, given))
        return images, images.batch(0, 1).shape[2], typed(flags, given)["num_classes"]
    trained = load_model(flags.samples, flags.model, flags.image_size, flags.num_classes, flags.vae, given,
                           distributed.device())
    distributed.print_rank0(trained.description())
    make = build_pipeline(trained.model, trained.autoencoder, **sampling_options(flags),
                       compute=build_compute_config(flags, distributed.device(), distributed.print_rank0))
    images = GeneratedImages(make, trained.num_classes, flags.num_fid_samples, flags.global_seed, flags.labels,
                             trained.metadata() | collect_environment(distributed.device()))
    return images, trained.image_size, trained.num_classes


def typed(flags, given):
    """The sizes that the user typed: what folders are cropped to and fractals are drawn in; None of the others."""
    return {name: getattr(flags, name) if name in given else None for name in ("image_size", "num_classes")}


def is_checkpoint(name):
    return name in PUBLISHED_CHECKPOINTS or name.endswith((".pt", ".pth", ".safetensors"))


def stem_of(samples):
    """The name that a record beside SAMPLES begins with."""
    return os.path.splitext(samples)[0] if os.path.isfile(samples) else os.path.normpath(samples)


def make_reference(flags, given):
    """Measure the images of --make-reference and write what can be compared with."""
    with distributed.raise_on_all_ranks():
        features = load_feature_space(flags.features, distributed.device(), flags.inception)
        images = open_image_source(flags.make_reference, **typed(flags, given))
    found = compute_statistics(images, features, flags.per_proc_batch_size, PRECISION_IMAGES, title="reference")

    def save():
        source = images.metadata() | (dict(pixels_sha256=found.pixels) if found.pixels else {})
        save_reference(flags.output, found, features, source | collect_environment(distributed.device()) | dict(tf32=False))
        print(f"wrote {flags.output}: {found.count} images, {len(found.pool[0])} features "
              f"({features.metadata()['space']})")

    distributed.run_on_rank0_and_broadcast(save)


def evaluate_likelihood(flags, given):
    """Bits per dimension of a checkpoint: prints them, and writes their record and a plot."""
    with distributed.raise_on_all_ranks():
        trained = load_model(flags.samples, flags.model, flags.image_size, flags.num_classes, flags.vae, given,
                               distributed.device())
        dataset = open_labelled(flags.nll, trained.image_size, trained.num_classes)
    distributed.print_rank0(trained.description())
    found = bits_per_dimension(trained, dataset, flags.nll_images, flags.per_proc_batch_size,
                                          flags.global_seed)

    def report():
        print(summarize_nll(found))
        path = flags.output or free_path(stem_of(flags.samples) + ".nll", ".json")
        write_record(path, dict(likelihood=found, data=dict(path=flags.nll, images=len(dataset)),
                                        model=trained.metadata(), seed=flags.global_seed,
                                        evaluated=collect_environment(distributed.device())))
        plot = os.path.splitext(path)[0] + ".png"
        plot_nll(found, plot)
        print(f"wrote {path} and {plot}")

    distributed.run_on_rank0_and_broadcast(report)


def open_labelled(path, image_size, num_classes):
    """The data set of --nll."""
    digits_size = BUILTIN_DATASETS["digits"]["image_size"]
    if parse_builtin_name(path)[0] == "digits" and image_size != digits_size:
        raise UserError(f"--nll {path}: the digits are {digits_size} pixels wide, the model is for {image_size}")
    try:
        return build_dataset(path, image_size, num_classes=num_classes)
    except UserError as error:
        raise UserError(str(error).replace("--data-path", "--nll")) from None


def show_differences(one, two):
    """Print every field in which two records differ, those of the scores first."""
    found = list(diff_records(read_record(one), read_record(two)))
    for path, first, second in found:
        print(f"{path}: {first} | {second}")
    if not found:
        print("the records do not differ")


if __name__ == "__main__":
    run_command(main)
