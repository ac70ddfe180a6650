"""Train on the digits while being killed at random for a quarter of an hour; compare with a run that was left alone.

    python tests/soak.py              # about 20 minutes; prints what it did, and OK or what differs

Not part of `make test`. The result of the last run is in docs/reliability.md.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def start(results, steps, *more):
    command = [sys.executable, ROOT / "train.py", "--data-path", "digits", "--num-workers", 1, "--max-steps", steps,
               "--ckpt-every", 25, "--keep-checkpoints", 2, "--async-save", "--results-dir", results, *more]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def main():
    from test_reliability import differences, stored
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="how long to kill")
    parser.add_argument("--steps", type=int, default=8000, help="of the whole run")
    flags = parser.parse_args()
    chance, kills, end = random.Random(0), 0, time.monotonic() + 60 * flags.minutes
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        undisturbed = start(alone, flags.steps)
        while time.monotonic() < end:
            child = start(killed, flags.steps, "--resume", "auto")
            try:
                child.wait(chance.uniform(4, 16))
                break  # it came to its end
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                kills += 1
        reached = max((int(path.stem) for path in killed.glob("*/checkpoints/*.pt")), default=0)
        assert start(killed, flags.steps, "--resume", "auto").wait() == 0
        assert undisturbed.wait() == 0
        last = len(list(killed.iterdir())) - 1  # a run that was killed before its first checkpoint left a folder behind
        found = differences(stored(alone, flags.steps), stored(killed, flags.steps, number=last))
        print(f"{kills} kills in {flags.minutes:g} minutes, {reached} of {flags.steps} steps done by then:",
              f"differs in {found[:5]}" if found else "OK, the same weights, EMA, optimiser and counters bit for bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
