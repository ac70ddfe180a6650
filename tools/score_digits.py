"""Judge samples of the digits: how many show the digit of their label, and how far they are from real digits.

    python -m tools.score_digits samples/NAME.npz

Distances are in pixel space, with those of as many real digits to compare.
"""
import common.startup  # noqa: F401

import argparse

import torch

from common.cli import HelpFormatter, parse_args
from common.errors import UserError, run_command
from common.files import read_npz_array
from data.dataset import evenly_spaced_indices
from evaluation.digits_classifier import DigitsClassifier
from evaluation.feature_statistics import RunningMoments
from evaluation.features import PixelFeatures
from evaluation.image_sources import BuiltinImages, NpzImages
from evaluation.metrics import frechet_distance


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("samples", nargs="+", metavar="NPZ", help="sets that sample_ddp.py made")
    return parser


def main():
    """Judge the sets of the command line."""
    flags, _ = parse_args(build_parser())
    classifier = DigitsClassifier()
    train, held_out = (images.batch(0, len(images)) for images in map(BuiltinImages, ("digits", "digits-held-out")))
    real = torch.cat([train, held_out])
    distance_of_halves = pixel_distance(real[0::2], real[1::2])
    for path in flags.samples:
        samples, labels = NpzImages(path), read_npz_array(path, "arr_1")
        if samples.images.shape[1:] != (8, 8, 3):
            raise UserError(f"{path} holds images of shape {samples.images.shape[1:]}, the digits are 8 x 8 pixels")
        print(f"{classifier.agreement(samples.images, labels):.1%} of {len(labels)} samples are classified as their "
              f"label, by a classifier that is right on {classifier.accuracy:.1%} of the real held-out digits")
        # The distance of few images is too large: only that of equally many real digits compares.
        baseline = train[evenly_spaced_indices(len(train), len(samples))]
        print(f"Frechet distance (pixels) to the {len(held_out)} held-out digits: "
              f"{pixel_distance(samples.batch(0, len(samples)), held_out):.3f} of {len(samples)} samples, "
              f"{pixel_distance(baseline, held_out):.3f} of {len(baseline)} real digits")
        print(f"Frechet distance (pixels) between two halves of all real digits: {distance_of_halves:.3f}")


def pixel_distance(*image_sets):
    """Compute the Frechet distance of two sets of images (n, 8, 8, 3) uint8 in pixel space."""
    features = PixelFeatures("cpu")
    gaussians = []
    for images in image_sets:
        rows = features(images).pool
        moments = RunningMoments(rows.shape[1])
        moments.add(rows)
        gaussians.append(moments.statistics())
    return frechet_distance(*gaussians)


if __name__ == "__main__":
    run_command(main)
