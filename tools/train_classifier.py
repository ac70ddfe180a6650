"""Train a small classifier of a data set, in whose features its images are then compared: evaluate.py --features FILE.

    python train_classifier.py --data-path fractals --output classifier.pt
    python train_classifier.py --data-path digits --steps 300 --output classifier.pt
    python evaluate.py samples/NAME.npz --reference fractals-held-out --features classifier.pt
"""

import argparse
import os

from common import distributed
from common.cli import HelpFormatter, non_negative_int, parse_args, positive_float, positive_int
from common.errors import UserError, run_command
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from evaluation.classifier import accuracy, save_classifier, train_classifier


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", required=True,
                       help="fractals, digits, or a folder with a folder of images a class")
    group.add_argument("--held-out-path", metavar="FOLDER",
                       help="images to find its accuracy on; default: fractals-held-out, digits-held-out")
    group.add_argument("--image-size", type=positive_int, default=256, help="pixels; fractals: 32, digits: 8")
    group.add_argument("--num-classes", type=positive_int, help="of fractals; default: 100")
    group.add_argument("--num-workers", type=non_negative_int, default=4, help="processes that load images")
    group = parser.add_argument_group("training")
    group.add_argument("--width", type=positive_int, default=32,
                       help="channels of the first layer; it has four times as many features")
    group.add_argument("--steps", type=positive_int, default=500, help="of AdamW")
    group.add_argument("--batch-size", type=positive_int, default=128, help="images a step")
    group.add_argument("--lr", type=positive_float, default=2e-3, help="highest learning rate")
    group.add_argument("--global-seed", type=non_negative_int, default=0, help="of all random numbers")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    parser.add_argument("--output", required=True, metavar="FILE", help="the classifier, a TorchScript file (.pt)")
    return parser


def main():
    flags, given = parse_args(build_parser())
    name, _ = parse_builtin_name(flags.data_path)
    if name and "image_size" not in given:
        flags.image_size = BUILTIN_DATASETS[name]["image_size"]
    if flags.num_classes and name != "fractals":
        raise UserError(f"--num-classes {flags.num_classes} is for --data-path fractals, not {flags.data_path}")
    folder = os.path.dirname(os.path.abspath(flags.output))
    if not os.path.isdir(folder):
        raise UserError(f"--output {flags.output}: there is no folder {folder}")
    train, held_out = open_both(flags, name)
    distributed.init(tf32=False)
    if distributed.world_size() > 1:
        raise UserError("train_classifier.py is for one process: start it without torchrun")

    def log(step, loss):
        if step % flags.log_every == 0 or step == flags.steps:
            print(f"(step={step:07d}) Train Loss: {loss:.4f}", flush=True)

    made = train_classifier(train, distributed.device(), flags.steps, flags.batch_size, flags.lr, flags.width,
                                       flags.global_seed, flags.num_workers, log)
    found = accuracy(made, held_out)
    print(f"right on {found:.2%} of {len(held_out)} images that it was not trained on")
    save_classifier(made, flags.output, in_words(flags, train), train.class_names, found)
    print(f"wrote {flags.output}: evaluate.py --features {flags.output}")


def open_both(flags, name):
    """The images to train on, and those to find the accuracy on."""
    train = build_dataset(flags.data_path, flags.image_size, num_classes=flags.num_classes)
    if not (path := flags.held_out_path or (name and f"{name}-held-out")):
        raise UserError(f"--data-path {flags.data_path} needs --held-out-path: a folder of other images of its classes")
    try:
        held_out = build_dataset(path, flags.image_size, num_classes=flags.num_classes)
    except UserError as error:
        raise UserError(str(error).replace("--data-path", "--held-out-path")) from None
    if held_out.class_names != train.class_names:
        raise UserError(f"--held-out-path {path} has other classes than --data-path {flags.data_path}")
    return train, held_out


def in_words(flags, train):
    return f"{os.path.basename(os.path.normpath(flags.data_path))} ({len(train.class_names)} classes)"


if __name__ == "__main__":
    run_command(main)
