"""Timing windows, and what all benchmarks share: flags, printed rows, JSON."""
import argparse
import gc
import inspect
import json
import platform
import statistics
import time

import torch

from common.cli import HelpFormatter, flag_name, parse_args, positive_int
from common.provenance import describe_hardware, git_commit
from evaluation.records import write_record
from models import DiT_models

_HELP = dict(model="architecture", batch="images at once", image_size="pixels", steps="sampling steps",
             warm_up="calls before the first window", calls="calls in each window", count="number of windows",
             seconds="length of a window in seconds",
             ablation="one speed flag after another, instead of none and all")


def run_benchmark(name, measure, format_row, description):
    """Run a benchmark as its command line says; its flags are the parameters of `measure`, with their defaults.

    Args:
        name (str): Name of the benchmark, for the JSON.
        measure (callable): (device, **flags) -> {name of a row: dict of numbers}.
        format_row (callable): (name of a row, row) -> line to print.
        description (str): What --help says.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    for flag, parameter in list(inspect.signature(measure).parameters.items())[1:]:
        options = dict(action="store_true") if parameter.default is False else dict(type=positive_int)
        options = dict(choices=DiT_models) if flag == "model" else options
        parser.add_argument(flag_name(flag), default=parameter.default, help=_HELP[flag], **options)
    parser.add_argument("--json", metavar="FILE", help="file for the results as JSON")
    flags = dict(vars(parse_args(parser)[0]))
    path = flags.pop("json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    results = measure(device, **flags)
    for row_name, row in results.items():
        print(format_row(row_name, row))
    record = dict(what=name, flags=flags, hardware=describe_hardware(device), torch=torch.__version__,
                  python=platform.python_version(), commit=git_commit(), date=time.strftime("%Y-%m-%d"),
                  results=results)
    print(json.dumps(record))
    if path:
        write_record(path, record)


def compare(builders, device, warm_up, count, calls):
    """Time several functions.

    A GPU measures one after the other. On the CPU the windows take turns and are compared round by round, since the
    speed of a CPU may drift by half within minutes.

    Args:
        builders (dict): {name: function that builds the function to time}. On a GPU each may run out of memory.
        device (str): "cuda" or "cpu".
        warm_up (int): Calls before the first window.
        count (int): Number of windows.
        calls (int): Calls in each window.

    Returns:
        dict: For each name seconds per call (median, `lowest` and `highest` window), warm_up_seconds, times_as_fast as
        the first, and on a GPU memory_gb, its peak; or out_of_memory.
    """
    if torch.device(device).type == "cuda":
        rows = {name: _time_or_out_of_memory(build, warm_up, count, calls) for name, build in builders.items()}
    else:
        rows = _time_in_turns(builders, warm_up, count, calls)
    baseline = next(iter(rows.values())).get("times")
    for row in rows.values():
        if times := row.pop("times", None):
            row |= summarize_times(times)
            if baseline:
                row["times_as_fast"] = statistics.median(base / here for base, here in zip(baseline, times))
    return rows


def time_alone(build, warm_up, count, calls):
    """Time one function; on a GPU with the peak of memory.

    Args:
        build (callable): () -> the function to time.
        warm_up (int): Calls before the first window.
        count (int): Number of windows.
        calls (int): Calls in each window.

    Returns:
        dict: warm_up_seconds, times (seconds per call of each window), and on a GPU memory_gb.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    function = build()
    row = dict(warm_up_seconds=_time_window(function, warm_up) * warm_up)
    row["times"] = [_time_window(function, calls) for _ in range(count)]
    if torch.cuda.is_available():
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def summarize_times(times):
    """Return the median of windows, and the `lowest` and `highest`."""
    return dict(seconds=statistics.median(times), lowest=min(times), highest=max(times))


def _time_or_out_of_memory(build, warm_up, count, calls):
    try:
        row = time_alone(build, warm_up, count, calls)
    except torch.OutOfMemoryError:
        row = dict(out_of_memory=True)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def _time_in_turns(builders, warm_up, count, calls):
    functions = {name: build() for name, build in builders.items()}
    rows = {name: dict(warm_up_seconds=_time_window(function, warm_up) * warm_up, times=[])
            for name, function in functions.items()}
    for _ in range(count):
        for name, function in functions.items():
            rows[name]["times"].append(_time_window(function, calls))
    torch._dynamo.reset()
    return rows


def _time_window(function, calls):
    """Return the seconds per call."""
    start = wait_and_read_clock()
    for _ in range(calls):
        function()
    return (wait_and_read_clock() - start) / max(calls, 1)


def wait_and_read_clock():
    """Return the time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def format_speed(name, row, unit):
    """Return the line of a row of `compare`; `unit` is what a call does, "step" or "batch"."""
    if "seconds" not in row:
        return f"{name:26s} out of memory"
    parts = [f"{name:26s} {row['seconds']:.3f} s a {unit} ({row['lowest']:.3f} to {row['highest']:.3f})",
             f"{row['images_per_second']:.1f} images/s"]
    parts += [template.format(row[key]) for key, template in (
        ("times_as_fast", "{:.2f} times as fast"), ("mfu", "MFU {:.1%}"), ("memory_gb", "{:.1f} GB")) if key in row]
    return "   ".join(parts)
