"""Evaluate samples and models: FID and other scores, references for them, and bits per dimension.

    python evaluate.py score samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py score DiT-XL-2-256x256.pt --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py reference /path/to/images --image-size 256 --output reference.npz
    python evaluate.py nll results/000-DiT-S-2/checkpoints/0002992.pt --data digits-held-out
    python evaluate.py diff A.scores.json B.scores.json

The scores are FID, sFID, Inception Score, precision and recall, as ADM's suite computes them. Images are an .npz, a
folder, digits, fractals, or one of these two with -held-out; of a checkpoint, the images that sample_ddp.py makes are
generated and scored. Every result is written to a record, with all that it depends on.

`evaluate.py COMMAND --help` shows the flags of a command. Former spellings without a command still work:
`SAMPLES --reference REF`, `--make-reference DATA`, `CKPT --nll DATA`, `--diff A B`.
"""
import argparse
import os
import sys

from common import distributed
from common.cli import (
    HelpFormatter,
    add_alias,
    add_compute_flags,
    build_compute_config,
    flag_name,
    minutes,
    non_negative_int,
    parse_args,
    positive_int,
)
from common.errors import ArgumentError, UserError, rename_arguments, run_command
from common.provenance import collect_environment
from data import build_dataset
from data.builtin import parse_builtin_name
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.image_sources import GeneratedImages, open_image_source
from evaluation.nll import bits_per_dimension, plot_nll, summarize_nll
from evaluation.records import diff_records, free_path, read_record, write_record
from evaluation.reference import NUM_REFERENCE_FEATURES, open_reference, save_reference
from evaluation.scores import check_comparable, compute_scores, distance_name, format_scores
from sampling.cli import add_model_flags, add_sampling_flags, sampling_options
from sampling.load_model import PUBLISHED_CHECKPOINTS, load_model
from sampling.pipeline import build_pipeline


def build_parser():
    """Build the parser of the command line; `run` and `parser` of a parsed line are those of its command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(run, name, summary):
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.",
                                      formatter_class=HelpFormatter)
        command.set_defaults(run=run, parser=command)
        return command

    add_score_flags(add_command(score, "score", "scores of samples against a reference"))
    add_reference_flags(add_command(reference, "reference", "statistics of images, to score samples against later"))
    add_nll_flags(add_command(nll, "nll", "bits per dimension of a model on a data set"))
    command = add_command(diff, "diff", "differences of two records")
    command.add_argument("records", nargs=2, metavar="RECORD", help="JSON files of score or nll")
    return parser


def add_score_flags(parser):
    """Add the flags of `score`."""
    parser.add_argument("samples", metavar="SAMPLES", help="an .npz, a folder, a built-in data set, or a checkpoint")
    parser.add_argument("--reference", required=True, metavar="REF",
                        help="ADM's .npz, an output of `evaluate.py reference`, or images: an .npz, a folder, ...")
    parser.add_argument("--output", metavar="FILE", help="the record; default: SAMPLES.scores.json")
    add_generation_flags(parser)
    add_feature_flags(parser)
    add_rank_flags(parser)


def add_generation_flags(parser):
    """Add the flags that only samples of a checkpoint have."""
    add_model_flags(parser, vae="ema", ckpt=False)
    add_sampling_flags(parser, cfg_scale=1.5)
    add_compute_flags(parser)
    group = parser.add_argument_group("samples of a checkpoint")
    group.add_argument("--num-fid-samples", type=positive_int, default=50000, help="number of images")
    group.add_argument("--label-distribution", choices=["uniform", "balanced"], default="uniform",
                       help="random classes (as published), or equally many of each")
    add_alias(parser, "--labels", "--label-distribution")
    add_seed_and_tf32(group)


def add_seed_and_tf32(group):
    """Add the flags of random numbers and precision of a model."""
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="random seed of labels and noise")
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="TF32 matrix products in the model (never in the features)")


def add_feature_flags(parser):
    """Add the flags of the feature space in which sets of images are compared."""
    group = parser.add_argument_group("features")
    group.add_argument("--features", default="inception",
                       help="inception (FID and the rest), pixels (up to 32 x 32), or a TorchScript module's file")
    group.add_argument("--inception", metavar="FILE", help="weights of Inception; default: downloaded once")


def add_rank_flags(parser):
    """Add the flags of each process."""
    group = parser.add_argument_group("processes")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images of a batch of each process")
    group.add_argument("--dist-timeout", type=minutes, default=distributed.DEFAULT_TIMEOUT, metavar="MINUTES",
                       help="time that a process waits for the others")
    add_alias(parser, "--timeout", "--dist-timeout")


def add_reference_flags(parser):
    """Add the flags of `reference`."""
    parser.add_argument("data", metavar="DATA", help="images: an .npz, a folder, or a built-in data set")
    parser.add_argument("--output", required=True, metavar="FILE", help="the reference, an .npz")
    parser.add_argument("--image-size", type=positive_int, help="pixels that images of a folder are cropped to")
    parser.add_argument("--num-classes", type=positive_int, help="number of classes of fractals")
    add_feature_flags(parser)
    add_rank_flags(parser)


def add_nll_flags(parser):
    """Add the flags of `nll`."""
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint: .pt or .safetensors")
    parser.add_argument("--data", required=True, help="a folder with a folder of images per class, digits-held-out, ...")
    parser.add_argument("--output", metavar="FILE", help="the record; default: CKPT.nll.json")
    parser.add_argument("--num-images", type=positive_int, default=1000,
                        help="images, evenly spaced over the data; 1000 forward passes each")
    add_alias(parser, "--nll-images", "--num-images")
    add_model_flags(parser, vae="ema", ckpt=False)
    add_seed_and_tf32(parser.add_argument_group("computation"))
    add_rank_flags(parser)


# What the former flag becomes: a command, and a flag in its place.
FORMER_SPELLINGS = {"--reference": ("score", ["--reference"]), "--make-reference": ("reference", []),
                    "--nll": ("nll", ["--data"]), "--diff": ("diff", [])}


def translate_former_spelling(argv):
    """Translate a command line without a command, such as `CKPT --nll DATA`, to `nll CKPT --data DATA`."""
    if argv and argv[0] in [command for command, _ in FORMER_SPELLINGS.values()]:
        return argv
    for position, argument in enumerate(argv):
        flag, *value = argument.split("=", 1)
        if flag in FORMER_SPELLINGS:
            command, replacement = FORMER_SPELLINGS[flag]
            return [command, *argv[:position], *replacement, *value, *argv[position + 1:]]
    return argv


def main():
    """Run the command line."""
    argv = translate_former_spelling(sys.argv[1:])
    command = build_parser().parse_args(argv)
    flags, explicit_args = parse_args(command.parser, argv=argv[1:])
    with rename_arguments(batch_size="per_proc_batch_size"):
        flags.run(flags, explicit_args)


def score(flags, explicit_args):
    """Score samples against a reference: print the scores and write their record."""
    check_generation_flags(flags, explicit_args)
    check_output(flags.output, ".json", flags.samples, flags.reference)
    distributed.init(flags.tf32 and flags.precision != "fp32", flags.dist_timeout)
    with distributed.collective_timeout("the evaluation", flags.dist_timeout):
        with distributed.raise_on_all_ranks():
            features = load_feature_space(flags.features, distributed.device(), flags.inception)
            images, num_classes = open_samples(flags, explicit_args)
            image_size = images.example_batch().shape[2]
        reference, metadata = open_reference(flags.reference, features, flags.per_proc_batch_size, image_size,
                                             num_classes)
        with distributed.raise_on_all_ranks():
            check_comparable(images, reference, features)
        samples = compute_statistics(images, features, flags.per_proc_batch_size, title="samples")

        def report():
            scores = compute_scores(samples, reference, features, images.class_labels())
            print("\n".join(format_scores(scores, features, samples, reference)))
            path = flags.output or free_path(f"{record_stem(flags.samples)}.scores", ".json")
            write_record(path, dict(scores=scores, name=distance_name(features, samples.count),
                                    features=features.metadata(), samples=samples.describe(images), reference=metadata,
                                    evaluated=collect_environment(distributed.device()) | dict(tf32=False)))
            print(f"wrote {path}")

        distributed.run_on_rank0_and_broadcast(report)
    distributed.shutdown()


def check_generation_flags(flags, explicit_args):
    """Refuse flags about samples of a checkpoint if SAMPLES are images."""
    if is_checkpoint(flags.samples):
        return
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    used_by_images = {"image_size"}
    if "fractals" in (parse_builtin_name(flags.samples)[0], parse_builtin_name(flags.reference)[0]):
        used_by_images.add("num_classes")
    for name in sorted(explicit_args & set(vars(parser.parse_args([]))) - used_by_images):
        raise UserError(f"{flag_name(name)} is for samples of a checkpoint, but {flags.samples} are images. "
                        "Leave it out")


def check_output(output, extension, *inputs):
    """Check that --output is a file that may be written."""
    if output is None:
        return
    if not output.endswith(extension):
        raise ArgumentError(f"the name must end in {extension}", output=output)
    if os.path.abspath(output) in map(os.path.abspath, inputs):
        raise ArgumentError("this would overwrite an input. Choose another name", output=output)
    folder = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(folder):
        raise ArgumentError(f"there is no folder {folder}", output=output)


def is_checkpoint(name):
    """Return whether a name is that of a checkpoint, not of images."""
    return name in PUBLISHED_CHECKPOINTS or name.endswith((".pt", ".pth", ".safetensors"))


def record_stem(path):
    """Return how the name of a record beside `path` begins."""
    return os.path.splitext(path)[0] if os.path.isfile(path) else os.path.normpath(path)


def open_samples(flags, explicit_args):
    """Return the images of SAMPLES, and their number of classes if known."""
    if not is_checkpoint(flags.samples):
        sizes = {name: getattr(flags, name) if name in explicit_args else None for name in ("image_size", "num_classes")}
        return open_image_source(flags.samples, **sizes), sizes["num_classes"]
    loaded = load_checkpoint_of(flags.samples, flags, explicit_args)
    pipeline = build_pipeline(loaded.model, loaded.autoencoder, **sampling_options(flags),
                              compute=build_compute_config(flags, distributed.device(), distributed.print_rank0))
    images = GeneratedImages(pipeline, loaded.num_classes, flags.num_fid_samples, flags.global_seed,
                             flags.label_distribution, loaded.metadata() | collect_environment(distributed.device()))
    return images, loaded.num_classes


def load_checkpoint_of(path, flags, explicit_args):
    """Load the model of a checkpoint by the model flags, and print what was loaded."""
    loaded = load_model(path, flags.model, flags.image_size, flags.num_classes, flags.vae, explicit_args,
                        distributed.device())
    distributed.print_rank0(loaded.description())
    return loaded


def reference(flags, explicit_args):
    """Measure images and write the reference."""
    check_output(flags.output, ".npz", flags.data)
    distributed.init(timeout=flags.dist_timeout)
    with distributed.collective_timeout("the evaluation", flags.dist_timeout):
        with distributed.raise_on_all_ranks():
            features = load_feature_space(flags.features, distributed.device(), flags.inception)
            images = open_image_source(flags.data, flags.image_size, flags.num_classes)
        statistics = compute_statistics(images, features, flags.per_proc_batch_size, NUM_REFERENCE_FEATURES, "reference")

        def save():
            environment = collect_environment(distributed.device()) | dict(tf32=False)
            save_reference(flags.output, statistics, features, statistics.describe(images) | environment)
            print(f"wrote {flags.output}: {statistics.count} images, {len(statistics.pool[0])} features "
                  f"({features.metadata()['space']})")

        distributed.run_on_rank0_and_broadcast(save)
    distributed.shutdown()


def nll(flags, explicit_args):
    """Compute bits per dimension: print them, and write their record and a plot."""
    if not is_checkpoint(flags.ckpt):
        raise UserError(f"{flags.ckpt} is not a checkpoint. Name a .pt or .safetensors file")
    check_output(flags.output, ".json", flags.ckpt, flags.data)
    distributed.init(flags.tf32, flags.dist_timeout)
    with distributed.collective_timeout("the evaluation", flags.dist_timeout):
        with distributed.raise_on_all_ranks(), rename_arguments(data_path="data"):
            loaded = load_checkpoint_of(flags.ckpt, flags, explicit_args)
            dataset = build_dataset(flags.data, loaded.image_size, num_classes=loaded.num_classes)
        result = bits_per_dimension(loaded, dataset, flags.num_images, flags.per_proc_batch_size, flags.global_seed)

        def report():
            print(summarize_nll(result))
            path = flags.output or free_path(f"{record_stem(flags.ckpt)}.nll", ".json")
            write_record(path, dict(likelihood=result, data=dict(path=flags.data, images=len(dataset)),
                                    model=loaded.metadata(), seed=flags.global_seed,
                                    evaluated=collect_environment(distributed.device())))
            plot = os.path.splitext(path)[0] + ".png"
            plot_nll(result, plot)
            print(f"wrote {path} and {plot}")

        distributed.run_on_rank0_and_broadcast(report)
    distributed.shutdown()


def diff(flags, explicit_args):
    """Print every field in which two records differ, the scores first."""
    differences = list(diff_records(*map(read_record, flags.records)))
    print("\n".join(f"{path}: {one} | {two}" for path, one, two in differences) or "the records do not differ")


if __name__ == "__main__":
    run_command(main)
