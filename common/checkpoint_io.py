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
CHECKPOINT_EXTENSIONS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6


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
    flags.

    Raises:
        UserError: If there is no such file, or if it is damaged or not a checkpoint.
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


def select_weights(checkpoint, path):
    """Select the weights to sample with: those of key "ema", else of "model", else the checkpoint itself ("bare").

    Args:
        checkpoint (dict): What `load_checkpoint` returned.
        path (str): Its path, for the error.

    Returns:
        tuple[dict[str, Tensor], str]: State dictionary, without the prefixes of wrappers (`module.` of DDP,
        `_orig_mod.` of torch.compile), and "ema", "model" or "bare".

    Raises:
        UserError: If there are no weights in it.
    """
    if isinstance(checkpoint, dict):
        for kind in ("ema", "model"):
            if isinstance(checkpoint.get(kind), dict) and checkpoint[kind]:
                return _strip_prefixes(checkpoint[kind]), kind
        if checkpoint and all(map(torch.is_tensor, checkpoint.values())):
            return _strip_prefixes(checkpoint), "bare"
    raise UserError(f"{path} holds no weights: it has neither 'ema' nor 'model', nor is it a state dictionary")


def _strip_prefixes(state_dict):
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


def load_weights(model, state_dict, path):
    """Load weights strictly; if they do not fit, raise a `UserError` with the differences and load none.

    Args:
        model (Module): The model.
        state_dict (dict[str, Tensor]): The weights.
        path (str): Path of their checkpoint, for the error.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) if torch.is_tensor(value) else None for name, value in state_dict.items()}
    differences = {
        "missing": sorted(shapes.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - shapes.keys()),
        "of another shape": [f"{name} {stored[name]} instead of {shape}" for name, shape in shapes.items()
                             if stored.get(name, shape) != shape]}
    problems = [f"{problem}: {_shorten(names)}" for problem, names in differences.items() if names]
    if problems:
        raise UserError(f"the weights in {path} do not fit this model ({'; '.join(problems)}). Check its name, its "
                        "sizes, image size and number of classes.")
    model.load_state_dict(state_dict, strict=True)


def _shorten(items):
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


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
    """Return the path of the latest checkpoint that is not damaged, or None if there are no checkpoints.

    Args:
        run_dir (str): Folder of the run.
        warn (callable): Called with a warning for each damaged checkpoint.

    Raises:
        UserError: If all checkpoints are damaged; the user must decide to start again.
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


def is_checkpoint(path):
    """Return whether a file is a checkpoint by its content; if that does not tell, or is not there, by its name."""
    by_name = path.lower().endswith(CHECKPOINT_EXTENSIONS)
    if not os.path.isfile(path):
        return by_name and not os.path.isdir(path)
    try:
        with open(path, "rb") as file:
            start = file.read(max(9, len(LEGACY_TORCH_MAGIC)))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.split("/")[1:] == ["data.pkl"] for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return by_name
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path)
    return start == LEGACY_TORCH_MAGIC or is_safetensors or by_name
