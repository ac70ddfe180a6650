"""What a model costs and a chip can do: multiply-adds, peak rates, windows of time."""
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense matrix products, FLOP/s by the makers' data sheets; what is not here gets no MFU.
PEAKS = {"H200": dict(bf16=989e12, tf32=494e12, fp32=67e12), "H100": dict(bf16=989e12, tf32=494e12, fp32=67e12),
         "A100": dict(bf16=312e12, tf32=156e12, fp32=19.5e12)}


def multiply_adds(model):
    """Of one forward pass of one image: half of what torch counts as FLOPs."""
    weight = next(model.parameters())
    x = torch.zeros(1, model.in_channels, *model.x_embedder.input_size, device=weight.device)
    label = torch.zeros(1, dtype=torch.long, device=weight.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, label, label)
    return counter.get_total_flops() / 2


def peak(device, precision):
    """FLOP/s of this device, or None where they are not known."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates[precision] for chip, rates in PEAKS.items() if chip in name), None)


def windows(function, device, warm_up, count, calls):
    """Seconds a call: median, lowest and highest of `count` windows of so many calls, after `warm_up` calls.

    return  dictionary with seconds, lowest, highest, warm_up_seconds, and the peak of memory in GB on a GPU
    """
    is_cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(warm_up):
        function()
    wait()
    warm_up_seconds = time.perf_counter() - start
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        times.append((time.perf_counter() - start) / calls)
    row = dict(seconds=statistics.median(times), lowest=min(times), highest=max(times),
               warm_up_seconds=warm_up_seconds)
    return row | (dict(memory_gb=torch.cuda.max_memory_allocated() / 1e9) if is_cuda else {})
