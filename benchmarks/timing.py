"""Windows of time."""

import gc
import statistics
import time

import torch


def compare(makers, device, warm_up, count, calls):
    """Seconds a call of several functions: median, lowest and highest of `count` windows of so many calls each, after
    `warm_up` calls; and how many times as fast as the first each is.

    makers  dictionary of functions that make the function to measure; a maker may raise `torch.OutOfMemoryError`
    return  a dictionary of each with seconds, lowest, highest, warm_up_seconds, times_as_fast, and on a GPU memory_gb,
            its peak; or with out_of_memory

    A GPU measures one after the other. On the CPU the windows take turns and are compared round by round, since its
    speed may change by half within minutes, by what else the machine does.
    """
    if torch.device(device).type == "cuda":
        rows = {name: _on_gpu(make, warm_up, count, calls) for name, make in makers.items()}
    else:
        rows = _in_turns(makers, warm_up, count, calls)
    first = next(iter(rows.values())).get("times")
    for row in rows.values():
        if times := row.pop("times", None):
            row |= dict(seconds=statistics.median(times), lowest=min(times), highest=max(times))
            if first:
                row["times_as_fast"] = statistics.median(one / own for one, own in zip(first, times))
    return rows


def _on_gpu(make, warm_up, count, calls):
    torch.cuda.reset_peak_memory_stats()
    try:
        function = make()
        row = dict(warm_up_seconds=_window(function, warm_up, torch.cuda.synchronize) * warm_up)
        row["times"] = [_window(function, calls, torch.cuda.synchronize) for _ in range(count)]
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    except torch.OutOfMemoryError:
        row = dict(out_of_memory=True)
    function = make = None
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def _in_turns(makers, warm_up, count, calls):
    functions = {name: make() for name, make in makers.items()}
    rows = {name: dict(warm_up_seconds=_window(function, warm_up) * warm_up, times=[])
            for name, function in functions.items()}
    for _ in range(count):
        for name, function in functions.items():
            rows[name]["times"].append(_window(function, calls))
    torch._dynamo.reset()
    return rows


def _window(function, calls, wait=lambda: None):
    """Seconds a call."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - start) / max(calls, 1)
