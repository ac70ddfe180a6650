"""Sample a picture: a grid of images of a trained DiT.

Examples:
    python sample.py --image-size 512 --seed 1                        # the published DiT-XL/2
    python sample.py --ckpt results/000-DiT-S-2/checkpoints/0002992.pt --class-labels 3 7 --samples-per-label 8
    python sample.py --class-labels "golden retriever" "macaw" 88 --num-sampling-steps ddim50
"""
import common.startup  # noqa: F401

import argparse
import json
import os

import torch
from PIL import Image

from common import distributed
from common.cli import HelpFormatter, add_compute_flags, non_negative_int, parse_args, positive_int
from common.errors import ArgumentError, run_command
from common.files import check_writable
from common.resources import check_memory, sampling_bytes
from data.image_io import save_image_grid
from sampling.class_labels import describe_labels, parse_class_labels, typed_labels
from sampling.cli import add_model_flags, add_sampling_flags, load_pipeline
from sampling.noise import GlobalRNG
from sampling.trajectory import TrajectoryRecorder

# The classes of the published picture: golden retriever, otter, red panda, geyser, macaw, valley, balloon, Arctic fox
IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]


def build_parser():
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser, vae="mse")
    add_sampling_flags(parser, cfg_scale=4.0)
    add_compute_flags(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--seed", type=non_negative_int, default=0, help="random seed")
    group.add_argument("--class-labels", nargs="+", metavar="LABEL",
                       help="numbers or names of classes; default: eight of ImageNet, or the first ten of other data")
    group.add_argument("--samples-per-label", type=positive_int, default=1, help="number of images of each label")
    group.add_argument("--columns", type=positive_int, help="images per row; default: --samples-per-label, or 4 if 1")
    group.add_argument("--output", default="sample.png", help="file of the picture")
    group.add_argument("--trajectory", action="store_true", help="a .gif of the path from noise to image, in addition")
    return parser


def main():
    """Sample the images of the labels and save them as one picture."""
    flags, explicit_args = parse_args(build_parser())
    check_output(flags.output, flags.trajectory)
    device = distributed.init(tf32=flags.precision != "fp32")
    loaded, pipeline = load_pipeline(flags, explicit_args, device)
    labels = choose_labels(flags.class_labels, loaded)
    print(f"classes: {describe_labels(labels, loaded.class_names, loaded.num_classes)}")
    num_images = len(labels) * flags.samples_per_label
    check_memory(sampling_bytes(loaded.model, num_images, loaded.image_size), device,
                 samples_per_label=flags.samples_per_label)
    y = torch.tensor(labels, device=device).repeat_interleave(flags.samples_per_label)

    trajectory = TrajectoryRecorder(pipeline.diffusion.num_timesteps) if flags.trajectory else None
    images = pipeline(dict(y=y), GlobalRNG(flags.seed, device), on_step=trajectory, progress=True)

    columns = flags.columns or (flags.samples_per_label if flags.samples_per_label > 1 else 4)
    metadata = pipeline.metadata() | dict(seed=flags.seed)
    average = dict(ema_decay=loaded.ema_decay) if flags.ema_decay is not None else {}
    typed = typed_labels(labels, loaded.class_names, loaded.num_classes)
    save_image_grid(images, columns, flags.output,
                    metadata | dict(class_labels=typed, checkpoint=loaded.description()) | average)
    print(f"wrote {flags.output}: {json.dumps(metadata)}")
    if trajectory:
        path = os.path.splitext(flags.output)[0] + ".gif"
        trajectory.save(loaded.autoencoder, columns, path)
        print(f"wrote {path}")


def check_output(output, trajectory):
    """Raise an `ArgumentError` if no picture can be written to `output`, before any work is done."""
    folder, extension = os.path.dirname(os.path.abspath(output)), os.path.splitext(output)[1].lower()
    if not os.path.isdir(folder):
        raise ArgumentError(f"there is no folder {folder}.", output=output)
    check_writable(output, output=output)
    if Image.registered_extensions().get(extension) not in Image.SAVE:
        raise ArgumentError(f"no picture format has the extension {extension!r}. Use .png.", output=output)
    if trajectory and extension == ".gif":
        raise ArgumentError("the trajectory would overwrite the picture. Give the picture another extension.",
                            output=output, trajectory=True)


def choose_labels(class_labels, loaded):
    """Return the labels of --class-labels, or the default ones of the model."""
    if class_labels:
        return parse_class_labels(class_labels, loaded.class_names, loaded.num_classes)
    return IMAGENET_LABELS if loaded.num_classes == 1000 else list(range(min(10, loaded.num_classes)))


if __name__ == "__main__":
    run_command(main)
