"""What a checkpoint costs: bytes, and the seconds that training waits for it."""

import os
import tempfile
import time
from types import SimpleNamespace

import torch

from common.checkpoint_io import save_checkpoint, verify_checkpoint
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from models import DiT_models
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_state import TrainState


def measure(device):
    """Weights, EMA and optimiser of DiT-B/2, and of DiT-XL/2, which needs 12 GB of memory and of disk."""
    rows = {}
    for name in ("DiT-B/2", "DiT-XL/2"):
        state = training_state(name, device)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "0000001.pt")
            row = dict(save_s=seconds(lambda state=state, path=path: save_checkpoint(path, state.values(1))))
            row["gigabytes"] = os.path.getsize(path) / 1e9
            row["check_s"] = seconds(lambda path=path: verify_checkpoint(path))
            row["restore_s"] = seconds(lambda state=state, path=path: state.restore(path))
            if name == "DiT-B/2" or device == "cuda":  # the copy must fit into host memory beside the rest
                row["async_copy_s"] = seconds(lambda state=state: state.copy(1))
        rows[name] = row
        del state
    return rows


def line(name, row):
    return f"{name:10s} " + "   ".join(f"{key} {value:.2f}" for key, value in row.items())


def training_state(name, device):
    """The state of a run after a step, without the run."""
    model = DiT_models[name]().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    guard = NonFiniteGuard(SimpleNamespace(num_processes=1, process_index=0), max_bad_steps=10)
    sampler = create_named_schedule_sampler("uniform", create_diffusion(""))
    return TrainState(model, optimizer, sampler, guard, EMA(model, 0.9999), {}, {})


def seconds(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
