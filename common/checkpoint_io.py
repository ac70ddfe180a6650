"""Checkpoint files: atomic writing, and reading that executes no code in them."""
import argparse
import os
import pickle
import re
import zipfile

import torch

from common.errors import UserError
from common.files import atomic_write

CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")


def save_checkpoint(path, state):
    """Write `state` (tensors and plain values) atomically, or raise a `UserError` and leave the old file."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch raises for a full disk
        raise UserError(f"cannot write the checkpoint {path}: {error}") from None


def verify_checkpoint(path):
    """Compare a checkpoint with its checksums, and raise a `UserError` if it is damaged.

    torch.save writes a zip archive with a CRC-32 of every tensor, which loading ignores. Files of other formats have
    no checksums, and only loading can tell.
    """
    try:
        if not zipfile.is_zipfile(path):  # raises for some kinds of damage
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damage causes errors of many types
        raise UserError(f"{path} is damaged, or not a checkpoint ({str(error) or type(error).__name__})") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not have its checksum")


def load_checkpoint(path):
    """Read a .pt or .safetensors file to host memory, without executing code in it.

    Only tensors and plain values are accepted, and the `argparse.Namespace` in which published checkpoints store their
    flags; all else raises a `UserError`.
    """
    if os.path.isdir(path):
        parent, folder = os.path.split(os.path.normpath(path))
        run_dir = parent if folder == "checkpoints" else path
        example = latest_checkpoint(run_dir) or "checkpoints/0050000.pt"
        raise UserError(f"{path} is a folder. Name a file in it, such as {example}")
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint file {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped: of the 10 GB of a DiT-XL/2's training state, sampling reads only the EMA.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path} was refused: it holds something other than tensors and plain values, "
                        "or is not a checkpoint") from None
    except Exception as error:  # damage causes errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read: it is damaged, or not a checkpoint ({reason})") from None


def list_checkpoints(run_dir):
    """Return {step: path} of the checkpoints in a run's folder, latest step first."""
    folder = os.path.join(run_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = filter(None, map(CHECKPOINT_NAME.fullmatch, names))
    paths = {int(match[1]): os.path.join(folder, match[0]) for match in matches}
    return dict(sorted(paths.items(), reverse=True))


def latest_checkpoint(run_dir):
    """Return the path of the checkpoint with the highest step in a run's folder, or None."""
    return next(iter(list_checkpoints(run_dir).values()), None)


def latest_valid_checkpoint(run_dir, warn):
    """Return the path of the latest checkpoint of a run that is not damaged, or None if there are no checkpoints.

    `warn` is called with a line about each damaged one. If all are, the user must decide what to do: a `UserError`.
    """
    paths = list(list_checkpoints(run_dir).values())
    for path in paths:
        try:
            verify_checkpoint(path)
            load_checkpoint(path)
            return path
        except UserError as error:
            warn(f"WARNING: {error}; trying the previous one")
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {os.path.dirname(paths[0])} are damaged. Remove them to "
                        "start again, or resume from another checkpoint.")
    return None
