"""Measure speed. Times depend on the machine; compare only numbers of one run.

    python benchmark.py process      what the diffusion process costs beside the network, against the plain formulas
    python benchmark.py data         how fast training gets latents and images, and the memory that it takes
    python benchmark.py save         what a checkpoint costs
"""
import argparse
import json
import platform
import time

import torch

import benchmarks.data
import benchmarks.process
import benchmarks.save
from runtime.provenance import hardware

MEASUREMENTS = {"process": benchmarks.process, "data": benchmarks.data, "save": benchmarks.save}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    measurement = MEASUREMENTS[parser.parse_args().what]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = measurement.measure(device)
    for name, row in results.items():
        print(measurement.line(name, row))
    print(json.dumps(dict(hardware=hardware(device), torch=torch.__version__, python=platform.python_version(),
                          date=time.strftime("%Y-%m-%d"), results=results)))


if __name__ == "__main__":
    main()
