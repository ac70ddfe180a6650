"""Kill a training run at random for a quarter of an hour, and compare it with an undisturbed one bit for bit.

    python -m tools.soak              # about 20 minutes; prints the number of kills, and OK or what differs

The result of the last run is in docs/reliability.md.
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

from common.checkpoint_io import latest_checkpoint, list_checkpoints, load_checkpoint
from common.cli import HelpFormatter, positive_float, positive_int
from training.run_dir import list_run_dirs

ROOT = Path(__file__).resolve().parents[1]


def start_training(results_dir, steps, *flags):
    """Start train.py on the digits in a process."""
    command = [sys.executable, ROOT / "train.py", "--data-path", "digits", "--num-workers", 1, "--max-steps", steps,
               "--ckpt-every", 25, "--keep-checkpoints", 2, "--async-save", "--results-dir", results_dir, *flags]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def kill_at_random(results_dir, steps, minutes):
    """Start and kill a run again and again; return the number of kills."""
    rng, kills, end = random.Random(0), 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        process = start_training(results_dir, steps, "--resume", "auto")
        try:
            process.wait(rng.uniform(4, 16))
            break  # the run is complete
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    return kills


def read_final_state(results_dir, steps):
    """Return the state after `steps` steps: tensors and numbers."""
    checkpoints = [list_checkpoints(run_dir) for run_dir in list_run_dirs(results_dir)]  # a killed start may leave one
    (path,) = [paths[steps] for paths in checkpoints if steps in paths]
    return {name: value for name, value in load_checkpoint(path).items() if name not in ("args", "config")}


def main():
    """Run the test; it raises an AssertionError if the states differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--minutes", type=positive_float, default=15, help="duration of the kills")
    parser.add_argument("--steps", type=positive_int, default=8000, help="length of the run")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed_dir, killed_dir = Path(folder, "undisturbed"), Path(folder, "killed")
        undisturbed = start_training(undisturbed_dir, flags.steps)
        kills = kill_at_random(killed_dir, flags.steps, flags.minutes)
        names = [os.path.basename(path) for path in map(latest_checkpoint, list_run_dirs(killed_dir)) if path]
        reached = max((int(name.removesuffix(".pt")) for name in names), default=0)
        if start_training(killed_dir, flags.steps, "--resume", "auto").wait() or undisturbed.wait():
            sys.exit("a run failed; see its log")
        print(f"{kills} kills in {flags.minutes:g} minutes, {reached} of {flags.steps} steps done by then")
        states = (read_final_state(results_dir, flags.steps) for results_dir in (undisturbed_dir, killed_dir))
        torch.testing.assert_close(*states, rtol=0, atol=0)
        print("OK, the same weights, EMA, optimizer and counters bit for bit")


if __name__ == "__main__":
    main()
