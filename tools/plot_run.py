"""Plot training runs: the loss, and the scores of their evaluations, over the steps.

    python -m tools.plot_run results/000-DiT-XL-2           # writes results/000-DiT-XL-2/training.png
    python -m tools.plot_run results/* --output runs.png    # several runs in one figure

The losses are those of log.txt, the scores those of evaluations.csv.
"""
import common.startup  # noqa: F401

import argparse
import os

from common.cli import HelpFormatter, parse_args
from common.errors import ArgumentError, run_command
from evaluation.plots import plot_runs


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py made")
    parser.add_argument("--output", metavar="FILE", help="the figure; default: training.png in the folder of the run")
    return parser


def main():
    """Plot the runs of the command line."""
    flags, _ = parse_args(build_parser())
    if len(flags.runs) > 1 and not flags.output:
        raise ArgumentError("several runs need the path of their common figure", output=None)
    path = flags.output or os.path.join(flags.runs[0], "training.png")
    folder = os.path.dirname(os.path.abspath(path))
    if flags.output and not os.path.isdir(folder):
        raise ArgumentError(f"there is no folder {folder}", output=flags.output)
    plot_runs(flags.runs, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
