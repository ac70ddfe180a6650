"""Parameters and multiply-adds of a network, and peak rates of GPUs."""
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class GPUSpec:
    """Memory and peak rates of a GPU, by its data sheet."""

    name: str
    torch_name: str  # a part of what torch.cuda.get_device_name returns
    memory: int      # bytes that torch reports, less than on the box
    bf16: float      # FLOP/s of dense matrix products, half of what data sheets give "with sparsity"
    tf32: float
    fp32: float      # without tensor cores


def _spec(name, torch_name, gibibytes, bf16, tf32, fp32):
    return GPUSpec(name, torch_name, int(gibibytes * 2**30), bf16 * 1e12, tf32 * 1e12, fp32 * 1e12)


# TFLOP/s: NVIDIA's data sheets of the A100, H100, H200 and L40S, and its Ada white paper (RTX 4090, sums in float32).
# GiB: the "total capacity" of torch's out-of-memory messages. A torch_name that contains another comes before it.
GPUS = {
    "a100-40": _spec("A100 40 GB", "A100-SXM4-40GB", 39.4, bf16=312, tf32=156, fp32=19.5),
    "a100": _spec("A100 80 GB", "A100", 79.1, bf16=312, tf32=156, fp32=19.5),
    "h100-pcie": _spec("H100 PCIe 80 GB", "H100 PCIe", 79.1, bf16=756, tf32=378, fp32=51),
    "h100": _spec("H100 SXM 80 GB", "H100", 79.1, bf16=989, tf32=494, fp32=67),
    "h200": _spec("H200 141 GB", "H200", 139.7, bf16=989, tf32=494, fp32=67),
    "l40s": _spec("L40S 48 GB", "L40S", 44.4, bf16=362, tf32=183, fp32=91.6),
    "rtx4090": _spec("RTX 4090 24 GB", "RTX 4090", 23.6, bf16=165, tf32=82.6, fp32=82.6),
}
# Parts of the names of GPUs with other rates: H100 NVL, H200 NVL, RTX 4090 D, RTX 4090 Laptop GPU, a slice of a GPU.
_OTHER_VARIANTS = ("NVL", "4090 D", "Laptop", "MIG")


def peak_flops(device, precision):
    """Return the peak FLOP/s of dense matrix products in "bf16", "tf32" or "fp32", or None if it is not known."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if any(part in name for part in _OTHER_VARIANTS):
        return None
    return next((getattr(spec, precision) for spec in GPUS.values() if spec.torch_name in name), None)


def count_parameters(model):
    """Count the trained parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def count_multiply_adds(model):
    """Count the multiply-adds of one forward pass of one image, half of what torch counts as FLOPs."""
    x = torch.zeros(1, *model.sample_shape, device=model.device)
    label = torch.zeros(1, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, label, label)
    return counter.get_total_flops() / 2


def training_step_flops(multiply_adds, batch):
    """Compute the FLOPs of one training step from the multiply-adds of one image.

    A multiply-add is two FLOPs; a backward pass costs two forward passes. Activation checkpointing is not counted.
    """
    return 6 * multiply_adds * batch
