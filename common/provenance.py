"""Provenance of a result: versions, commit, command, device."""
import datetime
import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata

import torch

PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate", "torch-fidelity", "numpy")


def collect_environment(device):
    """Return what a result on this device depends on apart from its flags; plain values."""
    device_type = torch.device(device).type
    is_cuda = device_type == "cuda"
    return dict(date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), commit=git_commit(),
                command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                device=describe_hardware(device_type),
                tf32=is_cuda and torch.backends.cuda.matmul.allow_tf32,
                python=platform.python_version(), versions=package_versions())


def describe_hardware(device_type):
    """Return a description of the GPU or the CPU; `device_type` is that of torch, such as "cuda"."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return (f"{device_type}, {platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}")


def package_versions():
    """Return {package: version} of the installed packages that affect results."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit():
    """Return the commit of this code, with "-dirty" if files have changed since, or None outside a git repository."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        done = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
