"""Parameters and multiply-adds of a network, and peak rates of GPUs."""
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class GPUSpec:
    """A GPU by its maker's data sheet.

    name             in words
    sign             what torch's name of the device contains
    memory           bytes that torch reports: less than on the box
    bf16, tf32, fp32 FLOP/s of dense matrix products, half of what sheets say "with sparsity"; fp32 without tensor cores
    """

    name: str
    sign: str
    memory: int
    bf16: float
    tf32: float
    fp32: float


def _spec(name, sign, gibibytes, bf16, tf32, fp32):
    return GPUSpec(name, sign, int(gibibytes * 2**30), bf16 * 1e12, tf32 * 1e12, fp32 * 1e12)


# TFLOP/s: NVIDIA's data sheets of the A100, H100, H200 and L40S, and its Ada white paper (RTX 4090, sums in float32).
# GiB: the "total capacity" of torch's out-of-memory messages. A sign that contains another stands before it.
GPUS = {
    "a100-40": _spec("A100 40 GB", "A100-SXM4-40GB", 39.4, bf16=312, tf32=156, fp32=19.5),
    "a100": _spec("A100 80 GB", "A100", 79.1, bf16=312, tf32=156, fp32=19.5),
    "h100-pcie": _spec("H100 PCIe 80 GB", "H100 PCIe", 79.1, bf16=756, tf32=378, fp32=51),
    "h100": _spec("H100 SXM 80 GB", "H100", 79.1, bf16=989, tf32=494, fp32=67),
    "h200": _spec("H200 141 GB", "H200", 139.7, bf16=989, tf32=494, fp32=67),
    "l40s": _spec("L40S 48 GB", "L40S", 44.4, bf16=362, tf32=183, fp32=91.6),
    "rtx4090": _spec("RTX 4090 24 GB", "RTX 4090", 23.6, bf16=165, tf32=82.6, fp32=82.6),
}
# In the names of relatives with other rates: H100 NVL, H200 NVL, RTX 4090 D, RTX 4090 Laptop GPU, a slice of a GPU.
_SLOWER_VARIANTS = ("NVL", "4090 D", "Laptop", "MIG")


def peak_flops(device, precision):
    """FLOP/s of this device, or None where they are not known."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if any(word in name for word in _SLOWER_VARIANTS):
        return None
    return next((getattr(chip, precision) for chip in GPUS.values() if chip.sign in name), None)


def count_parameters(model):
    """How many are trained."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def count_multiply_adds(model):
    """Of one forward pass of one image: half of what torch counts as FLOPs."""
    weight = next(model.parameters())
    x = torch.zeros(1, model.in_channels, *model.x_embedder.input_size, device=weight.device)
    label = torch.zeros(1, dtype=torch.long, device=weight.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, label, label)
    return counter.get_total_flops() / 2


def training_step_flops(multiply_adds, batch):
    """Of one training step: a multiply-add is two, and the backward pass costs two forward passes.

    What activation checkpointing computes again is not work done, and not counted.
    """
    return 6 * multiply_adds * batch
