"""Measure everything that needs a GPU, within a time limit; the same command continues.

    python -m benchmarks.gpu --minutes 9 --output docs/measurements/gpu
    python -m benchmarks.gpu --device cpu --output /tmp/tiny      # every row at a tiny size, without a GPU

`python -m benchmarks.gpu.tables` writes the results into the documents.
"""
import common.startup  # noqa: F401

import argparse
import functools
import sys

import torch

from benchmarks.gpu.row import Scale
from benchmarks.gpu.rows import PARTS, all_rows
from benchmarks.gpu.runner import command_to_continue, run_rows
from common.cli import HelpFormatter, parse_args, positive_float
from common.errors import ArgumentError, Stopped, run_command
from common.files import check_writable
from common.signals import StopSignals


def main():
    """Run the rows that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--minutes", type=positive_float, default=9, help="time limit")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of results.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: all rows at a tiny size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--retry-failed", action="store_true", help="run rows again that ended without a result")
    flags, _ = parse_args(parser)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("torch sees no GPU here. Try all rows at a tiny size: --device cpu", device="cuda")
    check_writable(flags.output, is_folder=True, output=flags.output)
    rows = [row for row in all_rows() if row.part in flags.parts]
    with StopSignals() as signals:
        try:
            left = run_rows(rows, Scale(flags.device, is_tiny=flags.device == "cpu"), flags.output, flags.minutes,
                            lambda: signals.received, flags.retry_failed, functools.partial(print, flush=True))
        except (Stopped, KeyboardInterrupt):
            print(f"stopped; to continue: {command_to_continue(sys.argv[1:])}", flush=True)
            raise
    if left:
        print(f"{len(left)} rows did not fit into {flags.minutes:g} minutes, the next is {left[0].name!r} (about "
              f"{left[0].seconds:.0f} s); to continue: {command_to_continue(sys.argv[1:])}")


if __name__ == "__main__":
    run_command(main)
