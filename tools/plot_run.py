"""Draw a training run: its loss, and the scores of its evaluations, over the steps.

    python plot_run.py results/000-DiT-XL-2            # writes results/000-DiT-XL-2/training.png
    python plot_run.py results/* --output runs.png     # several in one picture
"""

import argparse
import os

from common.cli import HelpFormatter
from common.errors import UserError, run_command
from evaluation.plots import plot_runs


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py made")
    parser.add_argument("--output", metavar="FILE", help="the picture; default: training.png in the run's folder")
    return parser


def main():
    flags = build_parser().parse_args()
    if len(flags.runs) > 1 and not flags.output:
        raise UserError("several runs need --output: where their common picture goes")
    folder = os.path.dirname(os.path.abspath(flags.output or "."))
    if not os.path.isdir(folder):
        raise UserError(f"--output {flags.output}: there is no folder {folder}")
    path = flags.output or os.path.join(flags.runs[0], "training.png")
    plot_runs(flags.runs, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
