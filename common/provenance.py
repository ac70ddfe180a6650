"""What a number was made with: versions, commit, device, precision."""

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
    """What a number depends on beside its flags; plain values."""
    kind = torch.device(device).type
    is_cuda = kind == "cuda"
    return dict(date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), commit=git_commit(),
                command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                device=describe_hardware(kind),
                tf32=is_cuda and torch.backends.cuda.matmul.allow_tf32,
                python=platform.python_version(), versions=package_versions())


def describe_hardware(kind):
    """What computes, in words; `kind` as torch names it: cuda, mps or cpu."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind}, {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def package_versions():
    """{package: version} of those that compute."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit():
    """The commit of this code, "-dirty" where files were changed since; None where git does not know."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        done = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
