"""Rows that check results on the device; each raises `CheckFailed` if a result is wrong."""
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import models
from benchmarks.dataloading import open_loader, write_random_cache
from benchmarks.gpu.row import CheckFailed
from benchmarks.gpu.sampling import build_sampler
from benchmarks.gpu.training import build_step, matmul_precision, randomize
from data.latent_cache.reader import LatentCache
from diffusion import create_diffusion

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(ROOT, "tests", "unit", "golden")


def require(condition, problem, measured):
    """Return what was measured, or raise `CheckFailed` with it."""
    if not condition:
        raise CheckFailed(problem, measured)
    return measured


# ---------------------------------------------------------------- golden vectors

class DrawOnHost(TorchFunctionMode):
    """Draw random numbers on the host, where the golden vectors were recorded, and move them to a device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.randn_like:
            return torch.randn(args[0].shape, device="cpu").to(self.device)
        if function is torch.randn:
            return torch.randn(*args, **kwargs | dict(device="cpu")).to(self.device)
        return function(*args, **kwargs)


class LoopsOnDevice:
    """A `GaussianDiffusion` whose loops run on a device, whatever device the caller names."""

    def __init__(self, diffusion, device):
        self._diffusion, self._device = diffusion, device

    def __getattr__(self, name):
        value = getattr(self._diffusion, name)
        if not name.endswith(("sample_loop", "sample_loop_progressive")):
            return value
        return lambda *args, **kwargs: value(*args, **kwargs | dict(device=self._device))


def check_golden_vectors(scale, tolerance=2e-4):
    """Compare the recorded results of the published method with those of this device, in full float32."""
    specification = importlib.util.spec_from_file_location("golden_vectors", os.path.join(GOLDEN, "vectors.py"))
    vectors = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(vectors)
    for name in ("draw", "ints"):
        setattr(vectors, name, _on_device(getattr(vectors, name), scale.device))
    with open(os.path.join(GOLDEN, "cases.json")) as file:
        cases = json.load(file)
    with (matmul_precision(scale, "fp32"), torch.device(scale.device), DrawOnHost(scale.device),
          np.load(os.path.join(GOLDEN, "golden.npz")) as recorded):
        results = vectors.run(cases, models, lambda *args, **kwargs: LoopsOnDevice(
            create_diffusion(*args, **kwargs), scale.device))
        differences, broken = vectors.compare(results, recorded)
    group = max(differences, key=differences.get)
    measured = dict(results=len(results), largest_difference=differences[group], group=group, broken=len(broken),
                    over_tolerance={name: value for name, value in differences.items() if value > tolerance})
    return require(not broken and differences[group] <= tolerance, "results differ from the recorded ones", measured)


def _on_device(function, device):
    return lambda *args: function(*args).to(device)


# ---------------------------------------------------------------- fast paths against the plain one

def compare_losses(scale, model="DiT-S/2", batch=64, steps=200, tolerance=0.02, options=()):
    """Train with and without options from the same weights on the same batches, and compare the losses.

    Args:
        scale (Scale): Device and size.
        model (str): A name of `DiT_models`.
        batch (int): Images per step.
        steps (int): Number of steps.
        tolerance (float): Largest difference of a loss.
        options (dict): Arguments of `build_step` to compare with train.py without flags.
    """
    batch, steps, losses = scale.batch(batch), scale.count(steps), {}
    for name, chosen in (("plain", dict(base="plain", fused=False)), ("fast", dict(options))):
        torch.manual_seed(0)
        with matmul_precision(scale, "tf32"):
            function, _, step = build_step(scale, model, batch, **chosen)
            for _ in range(steps):
                function()
        losses[name] = torch.stack(step.losses).float().cpu()
        step.train_step.guard.settle()
        torch._dynamo.reset()
    difference = (losses["plain"] - losses["fast"]).abs().max().item()
    measured = dict(steps=steps, largest_difference=difference, first_loss=losses["plain"][0].item(),
                    last_loss=losses["plain"][-1].item())
    return require(difference <= tolerance, "the losses differ", measured)


def compare_samples(scale, model="DiT-S/2", batch=16, steps="50", tolerance=0.05, options=()):
    """Sample with and without options from the same noise, and compare the latents, relative to the largest."""
    steps = "3" if scale.is_tiny else steps
    with matmul_precision(scale, "tf32"):
        plain = build_sampler(scale, model, batch, steps, base="plain")[0]()
        fast = build_sampler(scale, model, batch, steps, **dict(options))[0]()
    difference = ((plain - fast).abs().max() / plain.abs().max()).item()
    return require(difference <= tolerance, "the samples differ", dict(relative_difference=difference))


# ---------------------------------------------------------------- host synchronization

def check_training_never_waits(scale, model="DiT-S/2", batch=64):
    """Make torch raise an error if a training step of --fast waits for the GPU; without a GPU, run the steps."""
    step, _, _ = build_step(scale, model, scale.batch(batch))
    for _ in range(3):
        step()
    set_sync_debug_mode(scale, "error")
    for _ in range(3):
        step()
    set_sync_debug_mode(scale, "default")
    return dict(steps=3, mode="error" if scale.is_cuda else "no GPU: not checked")


def check_sampling_never_waits(scale, model="DiT-S/2", batch=16, steps="50", **options):
    """Make torch raise an error if a step of a guided sampling loop waits for the GPU."""
    sample, pipeline = build_sampler(scale, model, batch, "5" if scale.is_tiny else steps, **options)
    sample()
    last, checked = pipeline.diffusion.num_timesteps - 1, []

    def on_step(step, x):
        set_sync_debug_mode(scale, "error" if 0 <= step < last else "default")
        checked.append(step)

    sample(on_step)
    return dict(steps=len(checked) - 2, mode="error" if scale.is_cuda else "no GPU: not checked")


def set_sync_debug_mode(scale, mode):
    """Choose what torch does if the host waits for the GPU."""
    if scale.is_cuda:
        torch.cuda.set_sync_debug_mode(mode)


# ---------------------------------------------------------------- whole commands

def check_resume(scale, steps=20, flags=("--precision", "bf16", "--fused-adamw")):
    """Compare a run that was resumed half-way with one that was not, and that with its repetition.

    Kernels that add in any order make a repetition differ. Then the resumed run may differ as much.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in (("whole", [()]), ("again", [()]), ("resumed", [("--max-steps", steps // 2), ()])):
            for extra in commands:
                train(os.path.join(folder, name), scale, steps, *flags, *extra)
        weights = {name: load_weights(os.path.join(folder, name), steps) for name in ("whole", "again", "resumed")}
    repeated, resumed = (largest_difference(weights["whole"], weights[name]) for name in ("again", "resumed"))
    return require(resumed <= 3 * repeated, "a resumed run differs more from an undisturbed one than its repetition",
                   dict(repetition_differs=repeated, resumed_differs=resumed))


def train(folder, scale, steps, *flags):
    """Train a small network on the digits in a process of its own."""
    size = ("--depth", "2", "--hidden-size", "32", "--num-heads", "2") if scale.is_tiny else ()
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--data-path", "digits", *size, "--results-dir", folder,
               "--resume", "auto", "--allow-config-change", "--num-workers", "0", "--max-steps", str(steps)]
    environment = os.environ | ({} if scale.is_cuda else dict(CUDA_VISIBLE_DEVICES=""))
    done = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CheckFailed(f"train.py failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}", {})


def load_weights(folder, steps):
    """Return all tensors of weights, averages and moments of a run's checkpoint."""
    (path,) = glob.glob(os.path.join(glob.escape(folder), "*", "checkpoints", f"{steps:07d}.pt"))
    state = torch.load(path, map_location="cpu", weights_only=True)
    moments = {f"{i}.{name}": value for i, values in state["opt"]["state"].items() for name, value in values.items()}
    return dict(state["model"]) | {f"ema.{name}": value for name, value in state["ema"].items()} | moments


def largest_difference(one, two):
    """Return the largest difference between tensors of the same names."""
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one if one[name].numel())


def check_one_process_group(scale):
    """Start a process group of one rank (NCCL on a GPU, else gloo): collectives, and a step in DDP."""
    backend = "nccl" if scale.is_cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = torch.ones(1024, device=scale.device)
        dist.all_reduce(total)
        network = randomize(scale.network("DiT-S/2"))
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
        x, y = torch.randn(4, *network.sample_shape, device=scale.device), torch.arange(4, device=scale.device)
        gradients = []
        for module in (network, wrapped):
            network.zero_grad()
            module(x, y, y, force_drop_ids=torch.zeros_like(y)).square().mean().backward()
            gradients.append(network.final_layer.linear.weight.grad.clone())
        difference = (gradients[0] - gradients[1]).abs().max().item() / gradients[0].abs().max().item()
    finally:
        dist.destroy_process_group()
    measured = dict(backend=backend, gradient_difference=difference)
    return require(total.sum().item() == 1024 and difference < 1e-5, "collectives or DDP compute something else",
                   measured)


def check_cache_on_device(scale, count=2048, batch=256, steps=8):
    """Compare the batches of a latent cache that is read from files with those of --cache-on-device."""
    count, batch, steps = (64, 8, 3) if scale.is_tiny else (count, batch, steps)
    device = torch.device(scale.device)
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_cache(os.path.join(folder, "cache"), count)
        loaders = [open_loader(dataset, workers, device, batch, steps)
                   for dataset, workers in ((LatentCache(path), 2), (LatentCache(path).to_device(device), 0))]
        same = [torch.equal(one.to(device), two) for (one, _), (two, _) in zip(*loaders)]
    return require(all(same) and len(same) == steps, "the batches differ", dict(batches=len(same), batch=batch))
