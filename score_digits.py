"""Say how many samples of the embedded digits show the digit that was asked for.

    python score_digits.py samples/NAME.npz
"""
import argparse

from runtime.digits import DigitsClassifier
from runtime.errors import UserError, run_command
from runtime.flags import HelpFormatter
from runtime.sample_set import npz_array


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("samples", nargs="+", metavar="NPZ", help="sets that sample_ddp.py made")
    return parser


def main():
    classifier = DigitsClassifier()
    for path in build_parser().parse_args().samples:
        images, labels = npz_array(path, "arr_0"), npz_array(path, "arr_1")
        if images.shape[1:] != (8, 8, 3):
            raise UserError(f"{path} holds images of the shape {images.shape[1:]}, the digits are 8 x 8 pixels")
        print(f"{classifier.agreement(images, labels):.1%} of {len(labels)} samples are taken for the digit asked for, "
              f"by a classifier that is right on {classifier.accuracy:.1%} of the real held-out digits")


if __name__ == "__main__":
    run_command(main)
