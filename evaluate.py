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
import common.startup  # noqa: F401

import argparse
import os
import sys

from common import distributed
from common.cli import HelpFormatter, build_compute_config, flag_name, parse_args
from common.errors import ArgumentError, UserError, rename_arguments, run_command
from common.provenance import collect_environment
from common.resources import check_memory, sampling_bytes
from data import build_dataset
from data.builtin import parse_builtin_name
from data.digits import DigitsDataset
from evaluation import cli
from evaluation.cli import translate_former_spelling
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.image_sources import GeneratedImages, open_image_source
from evaluation.nll import bits_per_dimension, plot_nll, summarize_nll
from evaluation.records import check_output, diff_records, read_record, record_path, write_record
from evaluation.reference import NUM_REFERENCE_FEATURES, check_overwrite, open_reference, save_reference
from evaluation.scores import (
    check_comparable,
    compute_scores,
    distance_name,
    format_scores,
    left_out_scores,
    rounding_note,
)
from sampling.cli import sampling_options
from sampling.load_model import is_model, load_model
from sampling.pipeline import build_pipeline


def build_parser():
    """Build the parser of the command line; `run` and `parser` of a parsed line are those of its command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run, add_flags, summary in ((score, cli.add_score_flags, "scores of samples against a reference"),
                                    (reference, cli.add_reference_flags, "statistics of images, to score against"),
                                    (nll, cli.add_nll_flags, "bits per dimension of a model on a data set"),
                                    (diff, cli.add_diff_flags, "differences of two records")):
        command = commands.add_parser(run.__name__, help=summary, description=f"{summary.capitalize()}.",
                                      formatter_class=HelpFormatter)
        command.set_defaults(run=run, parser=command)
        add_flags(command)
    return parser


def main():
    """Run a command on all ranks."""
    argv = translate_former_spelling(sys.argv[1:])
    command, _ = build_parser().parse_known_args(argv)  # unknown flags are reported by the parser of the command
    flags, explicit_args = parse_args(command.parser, argv=argv[1:])
    if flags.run is diff:
        return diff(flags, explicit_args)
    distributed.init(getattr(flags, "tf32", True) and getattr(flags, "precision", "tf32") != "fp32", flags.dist_timeout)
    with (distributed.collective_timeout("the evaluation", flags.dist_timeout),
          rename_arguments(batch_size="per_proc_batch_size", data_path="data")):
        flags.run(flags, explicit_args)
    distributed.shutdown()


def score(flags, explicit_args):
    """Score samples against a reference: print the scores and write their record."""
    with distributed.raise_on_all_ranks():
        check_generation_flags(flags, explicit_args)
        check_output(flags.output, ".json", flags.samples, flags.reference,
                     default=record_path(None, flags.samples, "scores"))
        images, num_classes = open_samples(flags, explicit_args)
        features = load_feature_space(flags.features, distributed.device(), flags.inception)
        image_size = images.example_batch().shape[2]
    statistics, metadata = open_reference(flags.reference, features, flags.per_proc_batch_size, image_size, num_classes)
    with distributed.raise_on_all_ranks():
        check_comparable(images, statistics, features)
    samples = compute_statistics(images, features, flags.per_proc_batch_size, title="samples")

    def report():
        labels = images.class_labels() if features.predict_class else None
        scores = compute_scores(samples, statistics, features, labels)
        left_out = left_out_scores(samples, statistics, features, labels, images.labels_problem)
        path = record_path(flags.output, flags.samples, "scores")
        write_record(path, dict(scores=scores, name=distance_name(features, samples.count), left_out=left_out,
                                features=features.metadata(), samples=samples.describe(images), reference=metadata,
                                rounding=rounding_note(scores),
                                evaluated=collect_environment(distributed.device()) | dict(tf32=False)))
        print("\n".join([*format_scores(scores, features, samples, statistics),
                         *(f"{score}: left out, {reason}" for score, reason in left_out.items()), f"wrote {path}"]))

    distributed.run_on_rank0_and_broadcast(report)


def check_data_flags(flags, explicit_args, data):
    """Refuse --image-size and --num-classes if none of the sets of images, by their names, has a choice of them."""
    builtin_names = [parse_builtin_name(path)[0] for path in data]
    if "image_size" in explicit_args:
        check_memory(3 * flags.image_size**2, image_size=flags.image_size)
        if set(builtin_names) == {"digits"} and flags.image_size != DigitsDataset.image_size:
            raise ArgumentError(f"the digits have {DigitsDataset.image_size} pixels. Leave it out",
                                image_size=flags.image_size)
    if "num_classes" in explicit_args and "fractals" not in builtin_names:
        raise ArgumentError("only the fractals have a choice of classes. Leave it out", num_classes=flags.num_classes)


def check_generation_flags(flags, explicit_args):
    """Refuse flags about samples of a checkpoint if SAMPLES are images."""
    if is_model(flags.samples):
        return
    check_data_flags(flags, explicit_args, [flags.samples, flags.reference])
    parser = argparse.ArgumentParser()
    cli.add_generation_flags(parser)
    used = {"image_size", "num_classes"}
    for name in sorted(explicit_args & set(vars(parser.parse_args([]))) - used):
        raise UserError(f"{flag_name(name)} is for samples of a checkpoint, but {flags.samples} are images. "
                        "Leave it out")


def open_samples(flags, explicit_args):
    """Return the images of SAMPLES, and their number of classes if known."""
    if not is_model(flags.samples):
        image_size, num_classes = (getattr(flags, name) if name in explicit_args else None
                                   for name in ("image_size", "num_classes"))
        return open_image_source(flags.samples, image_size, num_classes), num_classes
    options = sampling_options(flags)
    loaded = load_checkpoint_model(flags.samples, flags, explicit_args)
    batch_size = min(flags.per_proc_batch_size, flags.num_fid_samples)
    check_memory(sampling_bytes(loaded.model, batch_size, loaded.image_size), distributed.device(),
                 per_proc_batch_size=flags.per_proc_batch_size)
    compute = build_compute_config(flags, distributed.device(), distributed.print_rank0)
    pipeline = build_pipeline(loaded.model, loaded.autoencoder, **options, compute=compute)
    images = GeneratedImages(pipeline, loaded.num_classes, flags.num_fid_samples, flags.global_seed,
                             flags.label_distribution, loaded.metadata() | collect_environment(distributed.device()))
    return images, loaded.num_classes


def load_checkpoint_model(path, flags, explicit_args):
    """Load the model of a checkpoint by the flags of `add_model_flags`, and print what was loaded."""
    loaded = load_model(path, flags.model, flags.image_size, flags.num_classes, flags.vae, explicit_args,
                        distributed.device(), flags.ema_decay, flags.weights)
    distributed.print_rank0(loaded.description())
    return loaded


def reference(flags, explicit_args):
    """Measure images and write the reference."""
    with distributed.raise_on_all_ranks():
        check_data_flags(flags, explicit_args, [flags.data])
        check_output(flags.output, ".npz", flags.data)
        images = open_image_source(flags.data, flags.image_size, flags.num_classes)
        if not flags.overwrite:
            check_overwrite(flags.output, images)
        features = load_feature_space(flags.features, distributed.device(), flags.inception)
    statistics = compute_statistics(images, features, flags.per_proc_batch_size, NUM_REFERENCE_FEATURES, "reference")

    def save():
        environment = collect_environment(distributed.device()) | dict(tf32=False)
        save_reference(flags.output, statistics, features, statistics.describe(images) | environment)
        print(f"wrote {flags.output}: {statistics.count} images, {len(statistics.pool[0])} features "
              f"({features.metadata()['space']})")

    distributed.run_on_rank0_and_broadcast(save)


def nll(flags, explicit_args):
    """Compute bits per dimension: print them, and write their record and a plot."""
    if not is_model(flags.ckpt):
        raise UserError(f"{flags.ckpt} is not a checkpoint. Name a .pt or .safetensors file")
    with distributed.raise_on_all_ranks():
        check_output(flags.output, ".json", flags.ckpt, flags.data, default=record_path(None, flags.ckpt, "nll"))
        loaded = load_checkpoint_model(flags.ckpt, flags, explicit_args)
        if parse_builtin_name(flags.data)[0] == "digits" and loaded.image_size != DigitsDataset.image_size:
            raise ArgumentError(f"the digits are not of the model's {loaded.image_size} pixels. Name other images",
                                data=flags.data)
        dataset = build_dataset(flags.data, loaded.image_size, num_classes=loaded.num_classes)
    result = bits_per_dimension(loaded, dataset, flags.num_images, flags.per_proc_batch_size, flags.global_seed)

    def report():
        path = record_path(flags.output, flags.ckpt, "nll")
        plot = os.path.splitext(path)[0] + ".png"
        write_record(path, dict(likelihood=result, data=dict(path=flags.data, images=len(dataset)),
                                model=loaded.metadata(), seed=flags.global_seed,
                                evaluated=collect_environment(distributed.device())))
        plot_nll(result, plot)
        print(f"{summarize_nll(result)}\nwrote {path} and {plot}")

    distributed.run_on_rank0_and_broadcast(report)


def diff(flags, explicit_args):
    """Print every field in which two records differ, the scores first."""
    differences = diff_records(*map(read_record, flags.records))
    print("\n".join(f"{path}: {one} | {two}" for path, one, two in differences) or "the records do not differ")


if __name__ == "__main__":
    run_command(main)
