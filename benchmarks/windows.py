"""Windows of time."""
import statistics
import time

import torch


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
