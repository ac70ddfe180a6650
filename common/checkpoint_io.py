"""Checkpoint files: atomic writing, and reading that executes nothing in them."""
import argparse
import os
import pickle
import re
import zipfile

import torch

from common.errors import UserError
from common.files import atomic_write


def save_checkpoint(path, state):
    """Write `state` (tensors and plain values) to `path`; a crash leaves the old file, or none, never half of one."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's word for a full disk
        raise UserError(f"cannot write the checkpoint {path}: {error}") from None


def verify_checkpoint(path):
    """Read a checkpoint from end to end and compare it with its checksums; a `UserError` where it is damaged.

    torch.save writes a zip archive, with a CRC-32 of every tensor's bytes in it; loading does not look at them. Of
    files of another kind, loading is the test.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged file fails in many ways; each means the same
        raise UserError(f"{path} is damaged, or no checkpoint ({error or type(error).__name__})") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not have its checksum")


def load_checkpoint(path):
    """Read a `.pt` or `.safetensors` file to host memory.

    Only tensors and plain values are accepted, and the `argparse.Namespace` in which published checkpoints keep their
    flags: anything else in a pickle could run code.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file in it, such as {latest_checkpoint(path) or 'checkpoints/0050000.pt'}")
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint file {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: of 10 GB of a DiT-XL/2's training state, sampling needs the quarter that is its EMA.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path} was refused: it holds something else than tensors and plain values, "
                        "or is no checkpoint at all") from None
    except Exception as error:  # a damaged file fails in many ways; each means the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read: it is damaged, or not a checkpoint ({reason})") from None


def select_weights(checkpoint, path):
    """The state dictionary to sample with, and what it was called: "ema", "model" or "bare".

    Prefixes that wrappers leave behind (DDP's `module.`, torch.compile's `_orig_mod.`) are taken off.
    """
    for which in ("ema", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(which), dict) and checkpoint[which]:
            return _strip_prefixes(checkpoint[which]), which
    if isinstance(checkpoint, dict) and checkpoint and all(torch.is_tensor(value) for value in checkpoint.values()):
        return _strip_prefixes(checkpoint), "bare"
    raise UserError(f"{path} holds no weights: neither 'ema' nor 'model', nor tensors alone")


def _strip_prefixes(state_dict):
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state_dict.items()}


def load_weights(model, state_dict, path):
    """`model.load_state_dict(strict=True)`, with a sentence where the two differ."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    shapes = [f"{name} is {tuple(getattr(state_dict[name], 'shape', ()))} there and {tuple(own[name].shape)} here"
              for name in own if name in state_dict and own[name].shape != getattr(state_dict[name], "shape", None)]
    problems = [f"missing: {_shorten(missing)}"] if missing else []
    problems += [f"not known: {_shorten(extra)}"] if extra else []
    problems += [_shorten(shapes, "; ")] if shapes else []
    if problems:
        raise UserError(f"the weights in {path} do not fit this model: {'; '.join(problems)}. "
                        "Do --model, --image-size, --num-classes and the sizes say what was trained?")
    model.load_state_dict(state_dict, strict=True)


def _shorten(items, separator=", "):
    return separator.join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")


def list_checkpoints(experiment_dir):
    """{step: path} of the checkpoints in an experiment's folder, the newest, which has the highest step, first."""
    folder = os.path.join(experiment_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {int(match[1]): os.path.join(folder, name) for name in names if (match := CHECKPOINT_NAME.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def latest_checkpoint(experiment_dir):
    """The checkpoint of the highest step in an experiment's folder, or None."""
    return next(iter(list_checkpoints(experiment_dir).values()), None)


def latest_valid_checkpoint(experiment_dir, warn):
    """The checkpoint of the highest step that is not damaged, or None where there is no checkpoint at all.

    warn   called with a sentence on every one that is passed over
    raise  UserError where all of them are damaged: to begin anew is not for this program to decide
    """
    paths = list(list_checkpoints(experiment_dir).values())
    for path in paths:
        try:
            verify_checkpoint(path)
            load_checkpoint(path)
            return path
        except UserError as error:
            warn(f"WARNING: {error}; looking for the one before")
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {os.path.dirname(paths[0])} are damaged, the newest too; "
                        "remove them to begin anew, or pass --resume the path of another one")
    return None
