"""Measure speed. Times depend on the machine; compare only numbers of one run.

    python benchmark.py train        training steps: the published recipe, ours without flags, ours with --fast
    python benchmark.py ablation     the same, one flag of speed after another
    python benchmark.py sample       guided sampling: the published loop, then one flag of speed after another
    python benchmark.py data         how fast training gets latents and images, and the memory that it takes
    python benchmark.py save         what a checkpoint costs
    python benchmark.py process      what the diffusion process costs beside the network, against the plain formulas

On a GPU:  python benchmark.py ablation --model DiT-XL/2 --batch 256 --warm-up 10 --calls 10
           python benchmark.py sample --model DiT-XL/2 --batch 32 --steps 250 --calls 1
"""
import argparse
import inspect
import json
import platform
import time

import torch

import benchmarks.ablation
import benchmarks.data
import benchmarks.process
import benchmarks.sample
import benchmarks.save
import benchmarks.train
from models import DiT_models
from runtime.provenance import commit, hardware

MEASUREMENTS = {"train": benchmarks.train, "ablation": benchmarks.ablation, "sample": benchmarks.sample,
                "data": benchmarks.data, "save": benchmarks.save, "process": benchmarks.process}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--model", choices=DiT_models, help="for train and sample; default: DiT-S/4")
    parser.add_argument("--batch", type=int, help="images at once")
    parser.add_argument("--image-size", type=int, help="pixels; default: 256")
    parser.add_argument("--steps", type=int, help="of sampling; default: 10")
    parser.add_argument("--warm-up", type=int, help="calls before the first window")
    parser.add_argument("--calls", type=int, help="in each window")
    parser.add_argument("--count", type=int, help="windows")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    return parser


def main():
    flags = build_parser().parse_args()
    measurement = MEASUREMENTS[flags.what]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = inspect.signature(measurement.measure).parameters
    given = {name: value for name, value in vars(flags).items() if name in known and value is not None}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    results = measurement.measure(device, **given)
    for name, row in results.items():
        print(measurement.line(name, row))
    record = json.dumps(dict(what=flags.what, flags=given, hardware=hardware(device), torch=torch.__version__,
                             python=platform.python_version(), commit=commit(), date=time.strftime("%Y-%m-%d"),
                             results=results))
    print(record)
    if flags.json:
        with open(flags.json, "w") as file:
            file.write(record + "\n")


if __name__ == "__main__":
    main()
