"""Train a small classifier of a data set, to compare images in its features: evaluate.py score --features FILE.

    python -m tools.train_classifier --data-path fractals --output classifier.pt
    python -m tools.train_classifier --data-path digits --steps 300 --output classifier.pt
    python evaluate.py score samples/NAME.npz --reference fractals-held-out --features classifier.pt

Its accuracy on the validation set is kept in the file, and printed with the scores.
"""
import common.startup  # noqa: F401

import argparse
import os

from common import distributed
from common.cli import HelpFormatter, add_alias, non_negative_int, parse_args, positive_float, positive_int
from common.errors import ArgumentError, UserError, rename_arguments, run_command
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from evaluation.classifier import compute_accuracy, save_classifier, train_classifier
from evaluation.records import check_output


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", required=True, help="fractals, digits, or a folder of class folders of images")
    group.add_argument("--val-path", metavar="FOLDER",
                       help="validation set, to compute the accuracy; default: fractals-held-out, digits-held-out")
    add_alias(group, "--held-out-path", "--val-path")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels; fractals: 32, digits: 8")
    group.add_argument("--num-classes", type=positive_int, help="number of classes of fractals; default: 100")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes that load images")
    group = parser.add_argument_group("training")
    group.add_argument("--width", type=positive_int, default=32,
                       help="channels of the first layer; the classifier has four times as many features")
    group.add_argument("--steps", type=positive_int, default=500, help="optimizer steps")
    group.add_argument("--batch-size", type=positive_int, default=128, help="images per step")
    group.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="random seed")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of the log")
    parser.add_argument("--output", required=True, metavar="FILE", help="the classifier, a TorchScript file (.pt)")
    return parser


def set_image_size(flags, explicit_args):
    """Return the default of --image-size for the data set."""
    name, _ = parse_builtin_name(flags.data_path)
    return dict(image_size=BUILTIN_DATASETS[name]["image_size"]) if name else {}


def main():
    """Train a classifier and write it."""
    flags, _ = parse_args(build_parser(), set_image_size)
    check_output(flags.output, "", flags.data_path)
    train, validation = open_datasets(flags)
    distributed.init(tf32=False)
    if distributed.world_size() > 1:
        raise UserError("tools.train_classifier runs in one process. Start it without torchrun")

    def log(step, loss):
        if step % flags.log_every == 0 or step == flags.steps:
            print(f"(step={step:07d}) Train Loss: {loss:.4f}", flush=True)

    classifier = train_classifier(train, distributed.device(), flags.steps, flags.batch_size, flags.lr, flags.width,
                                  flags.global_seed, flags.num_workers, log)
    accuracy = compute_accuracy(classifier, validation)
    print(f"accuracy {accuracy:.2%} on {len(validation)} images of the validation set")
    data = f"{os.path.basename(os.path.normpath(flags.data_path))} ({len(train.class_names)} classes)"
    save_classifier(classifier, flags.output, data, train.class_names, accuracy)
    print(f"wrote {flags.output}: evaluate.py score --features {flags.output}")


def open_datasets(flags):
    """Open the training set and the validation set."""
    name, _ = parse_builtin_name(flags.data_path)
    if flags.num_classes and name != "fractals":
        raise ArgumentError(f"only the fractals have a choice of classes, not {flags.data_path}. Leave it out",
                            num_classes=flags.num_classes)
    train = build_dataset(flags.data_path, flags.image_size, num_classes=flags.num_classes)
    path = flags.val_path or (name and f"{name}-held-out")
    if not path:
        raise ArgumentError(f"missing. Name a folder of other images of the classes of {flags.data_path}",
                            val_path=None)
    with rename_arguments(data_path="val_path"):
        validation = build_dataset(path, flags.image_size, num_classes=flags.num_classes)
    if validation.class_names != train.class_names:
        raise ArgumentError(f"the classes are not those of --data-path {flags.data_path}", val_path=path)
    return train, validation


if __name__ == "__main__":
    run_command(main)
