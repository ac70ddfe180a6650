"""Rows for tests of benchmarks.gpu: a result, and every way in which a row can fail."""
import os
import time

import torch

from benchmarks.gpu.row import CheckFailed, NotOnThisDevice, Row


def measure(scale, value):
    return dict(value=value)


def fail(scale, kind, path=None):
    if kind == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
    if kind == "error":
        raise RuntimeError("no kernel image is available for execution on the device\nmore lines")
    if kind == "failed":
        raise CheckFailed("results differ", dict(difference=0.5))
    if kind == "skipped":
        raise NotOnThisDevice("no such kernel")
    if kind == "crashed":
        os.abort()
    time.sleep(600)


def measure_slowly(scale, folder, number):
    """Note that it began, and take a while."""
    open(os.path.join(folder, f"began-{number}"), "a").close()
    time.sleep(1.0)
    return dict(number=number)


def row(name, function, part="training", seconds=1, **settings):
    return Row(name=name, part=part, function=f"stand_in_rows:{function}", settings=settings, seconds=seconds)
