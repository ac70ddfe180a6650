"""Download the published checkpoints to `pretrained_models/`.

Examples:
    python download.py                                     # both
    python download.py DiT-XL-2-256x256.pt --base-url https://mirror.example/DiT/
"""
import common.startup  # noqa: F401

import argparse

from common.cli import HelpFormatter, parse_args
from common.download import PRETRAINED_DIR, download
from common.errors import ArgumentError, run_command
from sampling.load_model import PUBLISHED_CHECKPOINTS, PUBLISHED_URL, find_model

__all__ = ["download", "find_model"]


def build_parser():
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"names of checkpoints; default: {', '.join(PUBLISHED_CHECKPOINTS)}")
    parser.add_argument("--folder", default=PRETRAINED_DIR, help="folder of the checkpoints")
    parser.add_argument("--base-url", default=PUBLISHED_URL, help="address of the folder with the checkpoints")
    parser.add_argument("--sha256", help="expected SHA-256 of the file, for a single NAME")
    return parser


def main():
    """Download the checkpoints that are not there yet and print their paths."""
    flags, _ = parse_args(build_parser())
    names = flags.names or PUBLISHED_CHECKPOINTS
    if flags.sha256 and len(names) != 1:
        raise ArgumentError("this is the hash of one file. Pass its name only.", sha256=flags.sha256)
    for name in names:
        print(download(name, flags.base_url, flags.folder, flags.sha256))


if __name__ == "__main__":
    run_command(main)
