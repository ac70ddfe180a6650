"""What this machine has (memory, processes, open files, disk), and errors before the work if that cannot suffice.

Needs are lower bounds, so that nothing is refused that could run.
"""
import math
import os
import shutil
from pathlib import Path

import psutil
import torch

from common import distributed
from common.errors import ArgumentError
from common.files import format_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None

WORKER_MEMORY, WORKER_FILES = 30e6, 4  # bytes and descriptors that a data-loading process takes at least


def available_memory(device="cpu"):
    """Return the bytes that can still be allocated: on a GPU, or on the host within all limits of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = [psutil.virtual_memory().available + psutil.swap_memory().free, *cgroup_memory()]
    if resource and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        bounds.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(bounds))


def cgroup_memory(process="/proc/self/cgroup", mount="/sys/fs/cgroup"):
    """List the free bytes in each control group (of version 1 or 2) that this process is in and that has a limit."""
    bounds = []
    for line in _read(process).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        prefix, files, cache = (("", ("memory.max", "memory.current"), "file") if controllers == "" else
                                ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_cache"))
        group = Path(mount, prefix, path.lstrip("/"))
        for folder in (group, *group.parents):
            limit, used = (_read(folder / name).strip() for name in files)
            if limit.isdecimal() and used.isdecimal():
                cached = dict(line.split() for line in _read(folder / "memory.stat").splitlines()).get(cache, 0)
                bounds.append(int(limit) - int(used) + int(cached))  # the cache of files makes room
            if folder == Path(mount):
                break
    return bounds


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_memory(needed, device="cpu", **arguments):
    """Raise an `ArgumentError` that names the parameters if `needed` bytes are more than a device has."""
    available = available_memory(device)
    if needed > available:
        raise ArgumentError(f"at least {format_bytes(needed)} of memory would be needed, {format_bytes(available)} are "
                            f"free on the {torch.device(device).type}. Choose a smaller value", **arguments)


def sampling_bytes(model, num_images, image_size):
    """Return how much memory sampling a batch of images takes at least: latents, tokens and pixels."""
    tokens = model.num_tokens * model.config.hidden_size
    return num_images * (4 * (3 * math.prod(model.sample_shape) + 3 * image_size**2) + 2 * 4 * tokens)


def check_disk(needed, folder, **arguments):
    """Raise an `ArgumentError` that names the parameters if `needed` bytes are more than the disk of a folder has."""
    available = free_disk(folder)
    if needed > available:
        raise ArgumentError(f"at least {format_bytes(needed)} would be written, the disk of {folder} has "
                            f"{format_bytes(available)} free. Choose a smaller value, or another disk", **arguments)


def free_disk(folder):
    """Return the free bytes of the disk that a folder is on, or will be."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def check_num_workers(num_workers):
    """Raise an `ArgumentError` for more data-loading processes than memory and the limits of this process allow."""
    everyone = num_workers * distributed.local_world_size()
    check_memory(everyone * WORKER_MEMORY, num_workers=num_workers)
    bounds = [(everyone, "processes are allowed", limit) for limit in _process_limits()]
    if resource:
        bounds.append((num_workers * WORKER_FILES, "open files are allowed (ulimit -n)",
                       resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    for needed, what, limit in bounds:
        if 0 <= limit < needed:
            raise ArgumentError(f"{needed} would be needed, {limit} {what}. A few per core are enough",
                                num_workers=num_workers)


def _process_limits():
    """List the limits of processes: of the user, of the system and of the control group."""
    limits = [text.strip() for text in map(_read, ("/proc/sys/kernel/pid_max", "/sys/fs/cgroup/pids.max"))]
    user = [resource.getrlimit(resource.RLIMIT_NPROC)[0]] if hasattr(resource, "RLIMIT_NPROC") else []
    return [int(text) for text in limits if text.isdecimal()] + user
