"""Fetch the published checkpoints to `pretrained_models/`.

    python download.py                                     # both
    python download.py DiT-XL-2-256x256.pt --base-url https://mirror.example/DiT/
"""
import argparse

from common.cli import HelpFormatter
from common.download import PRETRAINED_DIR, download
from common.errors import UserError, run_command
from sampling.load_model import PUBLISHED_CHECKPOINTS, PUBLISHED_URL, find_model

__all__ = ["download", "find_model"]


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(PUBLISHED_CHECKPOINTS)}")
    parser.add_argument("--folder", default=PRETRAINED_DIR, help="where to keep them")
    parser.add_argument("--base-url", default=PUBLISHED_URL, help="where from")
    parser.add_argument("--sha256", help="the hash that the file must have; for one NAME")
    return parser


def main():
    flags = build_parser().parse_args()
    names = flags.names or PUBLISHED_CHECKPOINTS
    if flags.sha256 and len(names) != 1:
        raise UserError("--sha256 is the hash of one file: name it")
    for name in names:
        print(download(name, flags.base_url, flags.folder, flags.sha256))


if __name__ == "__main__":
    run_command(main)
