"""Speed of training on the CPU while other programs use its cores, by how idle OpenMP threads wait for each other.

A thread that spins for another whose core is taken wastes the time that the other would need.
"""
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

from benchmarks.timing import run_benchmark

# Environment of each row. A thread spins GOMP_SPINCOUNT times before it sleeps; PASSIVE: not at all.
SETTINGS = {
    "the default of OpenMP": {},
    "GOMP_SPINCOUNT=10000": dict(GOMP_SPINCOUNT="10000"),
    "GOMP_SPINCOUNT=1000": dict(GOMP_SPINCOUNT="1000"),
    "GOMP_SPINCOUNT=300": dict(GOMP_SPINCOUNT="300"),
    "GOMP_SPINCOUNT=100": dict(GOMP_SPINCOUNT="100"),
    "OMP_WAIT_POLICY=PASSIVE": dict(OMP_WAIT_POLICY="PASSIVE"),
    "OMP_NUM_THREADS=1": dict(OMP_NUM_THREADS="1"),
}
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def measure(device, seconds=8, count=2):
    """Return the steps per second of the README's demo for each setting: on idle cores, one taken, all taken.

    Args:
        device (str): "cpu".
        seconds (int): Length of a window.
        count (int): Number of windows; the median counts.
    """
    cores = os.cpu_count()
    states = {"idle": 0, "one core taken": 1, "all cores taken": cores}
    times = {(name, state): [] for name in SETTINGS for state in states}
    for _ in range(count):
        for state, programs in states.items():
            others = [multiprocessing.Process(target=_occupy_core, daemon=True) for _ in range(programs)]
            for other in others:
                other.start()
            for name in SETTINGS:
                times[name, state].append(_measure_in_new_process(name, seconds))
            for other in others:
                other.kill()
                other.join()
    return {name: {state: statistics.median(times[name, state]) for state in states} for name in SETTINGS}


def format_row(name, row):
    """Return the line of a row."""
    return f"{name:26s} " + "   ".join(f"{state} {speed:.2f} steps/s" for state, speed in row.items())


def _occupy_core():
    while True:
        pass


def _measure_in_new_process(name, seconds):
    """Return steps per second; OpenMP reads its settings once, when torch is imported."""
    environment = {key: value for key, value in os.environ.items() if key not in _VARIABLES} | SETTINGS[name]
    command = [sys.executable, "-c", f"from benchmarks.cpu_contention import train; train({seconds})"]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def train(seconds):
    """Train the network of the README's demo on noise and print the steps per second."""
    import torch

    from benchmarks.train import OurStep
    from models import DiT_models

    torch.manual_seed(0)
    network = DiT_models["DiT-S/2"](input_size=8, in_channels=1, num_classes=10, depth=4, hidden_size=96, num_heads=4)
    step, images, labels = OurStep(network, "cpu", 64), torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    step(images, labels)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(images, labels)
        steps += 1
    print(steps / (time.perf_counter() - start))


def main():
    """Run the benchmark from the command line."""
    run_benchmark("cpu_contention", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
