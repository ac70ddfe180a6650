"""Make a picture: a grid of samples of a trained DiT.

    python sample.py --image-size 512 --seed 1                        # the published DiT-XL/2
    python sample.py --ckpt results/000-DiT-S-2/checkpoints/0002992.pt --class-labels 3 7 --samples-per-label 8
    python sample.py --class-labels "golden retriever" "macaw" 88 --num-sampling-steps ddim50
"""
import argparse
import json
import os

import torch
from PIL import Image

from common import distributed
from common.cli import (
    HelpFormatter,
    add_compute_flags,
    build_compute_config,
    non_negative_int,
    parse_args,
    positive_int,
)
from common.errors import UserError, run_command
from data.image_io import save_image_grid
from sampling.class_labels import parse_class_labels
from sampling.cli import add_model_flags, add_sampling_flags, sampling_options
from sampling.load_model import load_model
from sampling.noise import GlobalRNG
from sampling.pipeline import build_pipeline
from sampling.trajectory import TrajectoryRecorder

# The classes of the published picture: golden retriever, otter, red panda, geyser, macaw, valley, balloon, Arctic fox
IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser, vae="mse")
    add_sampling_flags(parser, cfg_scale=4.0)
    add_compute_flags(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--seed", type=non_negative_int, default=0, help="of the noise")
    group.add_argument("--class-labels", nargs="+", metavar="LABEL",
                       help="numbers or names; default: eight of ImageNet, or the first ten classes of other data")
    group.add_argument("--samples-per-label", type=positive_int, default=1, help="more than 1: a row of the grid each")
    group.add_argument("--columns", type=positive_int, help="images a row; default: --samples-per-label, or 4 for 1")
    group.add_argument("--output", default="sample.png", help="the picture's file")
    group.add_argument("--trajectory", action="store_true", help="also write the way from noise to image, as a .gif")
    return parser


def main():
    flags, given = parse_args(build_parser())
    check_output(flags.output, flags.trajectory)
    device = distributed.init(tf32=flags.precision != "fp32")
    trained = load_model(flags.ckpt, flags.model, flags.image_size, flags.num_classes, flags.vae, given, device)
    print(trained.description())
    make = build_pipeline(trained.model, trained.autoencoder, **sampling_options(flags),
                       compute=build_compute_config(flags, device, print))
    if flags.class_labels:
        chosen = parse_class_labels(flags.class_labels, trained.class_names, trained.num_classes)
    else:
        chosen = IMAGENET_LABELS if trained.num_classes == 1000 else list(range(min(10, trained.num_classes)))
    labels = torch.tensor(chosen, device=device).repeat_interleave(flags.samples_per_label)
    columns = flags.columns or (flags.samples_per_label if flags.samples_per_label > 1 else 4)

    path = TrajectoryRecorder(make.diffusion.num_timesteps) if flags.trajectory else None
    images = make(labels, GlobalRNG(flags.seed, device), on_step=path, progress=True)
    record = make.metadata() | dict(seed=flags.seed, class_labels=chosen, checkpoint=trained.description())
    save_image_grid(images, columns, flags.output, record)
    print(f"wrote {flags.output}: {json.dumps(make.metadata() | dict(seed=flags.seed))}")
    if path:
        gif = os.path.splitext(flags.output)[0] + ".gif"
        path.save(trained.autoencoder, columns, gif)
        print(f"wrote {gif}")


def check_output(path, trajectory):
    """Before the work, not after it: can a picture be written there?"""
    folder, extension = os.path.dirname(os.path.abspath(path)), os.path.splitext(path)[1].lower()
    if not os.path.isdir(folder):
        raise UserError(f"--output {path}: there is no folder {folder}")
    if Image.registered_extensions().get(extension) not in Image.SAVE:
        raise UserError(f"--output {path}: no picture format has the ending {extension!r}; take .png")
    if trajectory and extension == ".gif":
        raise UserError(f"--output {path}: --trajectory writes a .gif of this name, give the picture another ending")


if __name__ == "__main__":
    run_command(main)
