"""Train on the digits while the process is killed at random moments, and compare with an undisturbed run.

    python -m tools.soak              # about 20 minutes

The last line says OK, or what differs. `make test` does not include it.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.checkpoint_io import load_checkpoint
from common.cli import HelpFormatter, parse_args, positive_float, positive_int

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("model", "ema", "opt", "schedule_sampler", "guard", "step")


def start(results_dir, num_steps, *flags):
    """Start a training run in another process."""
    command = [sys.executable, ROOT / "train.py", "--data-path", "digits", "--num-workers", 1, "--max-steps", num_steps,
               "--ckpt-every", 25, "--keep-checkpoints", 2, "--async-save", "--results-dir", results_dir, *flags]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def kill_repeatedly(results_dir, num_steps, minutes):
    """Kill a run every 4 to 16 seconds and resume it; return the kills, and the step of the latest checkpoint."""
    generator, kills, end = random.Random(0), 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        process = start(results_dir, num_steps, "--resume", "auto")
        try:
            process.wait(generator.uniform(4, 16))
            break  # all steps are done
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    steps = [int(path.stem) for path in results_dir.glob("*/checkpoints/*.pt")]
    return kills, max(steps, default=0)


def load_final_state(results_dir, num_steps):
    """Load the last checkpoint of a run; kills before the first checkpoint leave empty runs behind."""
    (path,) = results_dir.glob(f"*/checkpoints/{num_steps:07d}.pt")
    return load_checkpoint(str(path))


def list_differences(one, two):
    """List the parts of two checkpoints that are not equal bit for bit."""
    return [part for part in PARTS if not is_equal(one[part], two[part])]


def is_equal(one, two):
    """Compare nested dictionaries and lists of tensors and plain values."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_equal(value, two[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(is_equal, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def main():
    """Run the comparison; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--minutes", type=positive_float, default=15, help="minutes during which the run is killed")
    parser.add_argument("--steps", type=positive_int, default=8000, help="steps of the run")
    flags, _ = parse_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed_dir, killed_dir = Path(folder, "undisturbed"), Path(folder, "killed")
        undisturbed = start(undisturbed_dir, flags.steps)
        kills, step = kill_repeatedly(killed_dir, flags.steps, flags.minutes)
        for process in (start(killed_dir, flags.steps, "--resume", "auto"), undisturbed):
            if process.wait():
                sys.exit(f"train.py exited with status {process.returncode}")
        changed = list_differences(*(load_final_state(path, flags.steps) for path in (undisturbed_dir, killed_dir)))
    print(f"{kills} kills in {flags.minutes:g} minutes, after which {step} of {flags.steps} steps were done:",
          f"{', '.join(changed)} differ" if changed else "OK, the final states are equal bit for bit")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
