"""Cost of a checkpoint: its size, and the seconds that training waits for it.

DiT-XL/2 needs 12 GB of memory and of disk.
"""
import os
import tempfile

import torch

from benchmarks.timing import run_benchmark, wait_and_read_clock
from common.checkpoint_io import verify_checkpoint
from models import DiT_models
from training.checkpoint_manager import CheckpointManager
from training.ema import EMA
from training.train_state import ModelState, OptimizerState


def measure(device):
    """Return sizes and times for weights, EMA and optimizer of DiT-B/2 and DiT-XL/2."""
    # The copy in host memory must fit in addition to the rest.
    return {name: measure_model(name, device, copies=name == "DiT-B/2" or device == "cuda")
            for name in ("DiT-B/2", "DiT-XL/2")}


def measure_model(name, device, copies):
    """Return the row of one model; `copies` measures the copy that an asynchronous save makes, too."""
    with tempfile.TemporaryDirectory() as run_dir:
        checkpoints = build_checkpoints(name, device, run_dir)
        row = dict(save_s=seconds(lambda: checkpoints.save(1)))
        path = os.path.join(checkpoints.dir, "0000001.pt")
        row["gigabytes"] = os.path.getsize(path) / 1e9
        row["check_s"] = seconds(lambda: verify_checkpoint(path))
        row["restore_s"] = seconds(lambda: checkpoints.restore(path))
        if copies:
            row["async_copy_s"] = seconds(lambda: checkpoints.state(1, copy=True))
    return row


def build_checkpoints(name, device, run_dir):
    """Return the `CheckpointManager` of a run after its first step, without the run."""
    model = DiT_models[name]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return CheckpointManager(run_dir, {}, model=ModelState(model), ema=ModelState(EMA(model, 0.9999).model),
                             opt=OptimizerState(optimizer, model))


def seconds(function):
    """Return how long a call takes."""
    start = wait_and_read_clock()
    function()
    return wait_and_read_clock() - start


def format_row(name, row):
    """Return the line of a row."""
    return f"{name:10s} " + "   ".join(f"{key} {value:.2f}" for key, value in row.items())


def main():
    """Run the benchmark from the command line."""
    run_benchmark("checkpointing", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
