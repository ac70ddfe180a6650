"""Judge samples of the embedded digits: how many show the digit that was asked for, how far they are from real ones.

    python score_digits.py samples/NAME.npz
"""

import argparse

import torch

from common.cli import HelpFormatter
from common.errors import UserError, run_command
from common.files import read_npz_array
from data.dataset import evenly_spaced_indices
from evaluation.digits_classifier import DigitsClassifier
from evaluation.feature_statistics import RunningMoments
from evaluation.features import PixelFeatures
from evaluation.image_sources import BuiltinImages, NpzImages
from evaluation.metrics import frechet_distance


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("samples", nargs="+", metavar="NPZ", help="sets that sample_ddp.py made")
    return parser


def main():
    classifier = DigitsClassifier()
    train, held_out = (images.batch(0, len(images)) for images in map(BuiltinImages, ("digits", "digits-held-out")))
    real = torch.cat([train, held_out])
    halves = distance(real[0::2], real[1::2])
    for path in build_parser().parse_args().samples:
        images, labels = NpzImages(path), read_npz_array(path, "arr_1")
        if images.images.shape[1:] != (8, 8, 3):
            raise UserError(f"{path} holds images of the shape {images.images.shape[1:]}, the digits are 8 x 8 pixels")
        print(f"{classifier.agreement(images.images, labels):.1%} of {len(labels)} samples are taken for the digit "
              f"asked for, by a classifier that is right on {classifier.accuracy:.1%} of the real held-out digits")
        # A distance of few images is too large, and the more so the fewer they are: only equal numbers compare.
        like_samples = train[evenly_spaced_indices(len(train), len(images))]
        print(f"Frechet distance (pixels) to the {len(held_out)} held-out digits: "
              f"{distance(images.batch(0, len(images)), held_out):.3f} of {len(images)} samples, "
              f"{distance(like_samples, held_out):.3f} of {len(like_samples)} real digits")
        print(f"Frechet distance (pixels) between two halves of all real digits: {halves:.3f}")


def distance(one, other):
    """The Frechet distance of two sets of images (n, 8, 8, 3) uint8 in the space of their pixels."""
    features = PixelFeatures("cpu")
    moments = []
    for images in (one, other):
        rows = features(images).pool
        moments.append(RunningMoments(rows.shape[1]))
        moments[-1].add(rows)
    return frechet_distance(*(moment.statistics() for moment in moments))


if __name__ == "__main__":
    run_command(main)
