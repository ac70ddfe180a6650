"""Checkpoint files: atomic writing, and reading that executes no code in them."""
import argparse
import json
import os
import pickle
import re
import zipfile

import torch

from common.errors import UserError
from common.files import atomic_write

CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")
SHARD_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")  # as transformers and diffusers name the files of one model
METADATA_KEY = "dit"  # of plain values in the header of a .safetensors file
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# Formats that are taken for checkpoints by mistake.
NOT_CHECKPOINTS = {
    "empty": "empty. Copy or download it again", "html": "a web page. Download the file itself",
    "git-lfs": "a pointer of Git LFS to the file. Fetch it by `git lfs pull`", "json": "a JSON text",
    "npz": "an .npz of NumPy arrays", "npy": "a NumPy array", "image": "an image", "hdf5": "an HDF5 file",
    "gzip": "compressed. Unpack it first", "zstd": "compressed. Unpack it first",
    "zip": "an archive. Unpack it, or download it again"}
MAGIC_BYTES = [(b"version https://git-lfs", "git-lfs"), (b"<!doctype", "html"), (b"<html", "html"), (b"{", "json"),
               (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x89hdf", "hdf5"), (b"\x89png", "image"),
               (b"\xff\xd8\xff", "image"), (b"\x93numpy", "npy"), (b"\x80", "pickle")]


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


def is_checkpoint(path):
    """Return whether a name is that of a checkpoint, by the content of the file, or else by its ending."""
    kind = detect_format(path)
    if os.path.isdir(path) or kind == "npz":
        return False
    return path.lower().endswith(ENDINGS) or kind in ("torch", "safetensors", "pickle", "index")


def load_checkpoint(path):
    """Read a checkpoint of torch, a .safetensors file, or several files by their index, to host memory.

    No code in it is executed: only tensors and plain values are accepted, and the `argparse.Namespace` in which
    published checkpoints store their flags. All else raises a `UserError`.
    """
    if os.path.isdir(path):
        raise UserError(_describe_folder(path))
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint file {path}")
    if shards := _find_shards(path):
        return {name: value for shard in shards for name, value in _read_file(shard).items()}
    return _read_file(path)


def _read_file(path):
    file_format = detect_format(path)
    if file_format in NOT_CHECKPOINTS:
        raise UserError(f"{path} is damaged, or not a checkpoint: it is {NOT_CHECKPOINTS[file_format]}")
    try:
        if file_format == "safetensors" or path.lower().endswith(".safetensors"):
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped: of the 10 GB of a DiT-XL/2's training state, sampling reads only the EMA.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        is_wrapped = isinstance(content, (list, tuple)) and len(content) == 1 and isinstance(content[0], dict)
        return content[0] if is_wrapped else content
    except pickle.UnpicklingError as error:
        types = _refused_types(path, error)
        if not types:
            raise UserError(f"{path} is not a checkpoint, or damaged: its content is none that torch.save or "
                            "safetensors writes") from None
        raise UserError(f"{path} was refused: it holds {', '.join(types)}, and only tensors and plain values are read, "
                        "since anything else can run code. If you trust its origin, load it by torch.load(..., "
                        "weights_only=False) and save its weights alone") from None
    except Exception as error:  # damage causes errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read: it is damaged, or not a checkpoint ({reason})") from None


def _read_safetensors(path):
    """Return the weights of a file, with what `write_safetensors` stored beside them under other keys."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = (file.metadata() or {}).get(METADATA_KEY)
    try:
        metadata = json.loads(stored) if stored else None
    except ValueError:
        metadata = None
    return metadata | dict(model=weights) if isinstance(metadata, dict) else weights


def write_safetensors(path, weights, metadata):
    """Write weights as a .safetensors file, with plain values (dict) as JSON in its header, atomically."""
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in weights.items()},
                   {METADATA_KEY: json.dumps(metadata), "format": "pt"})
    with atomic_write(path) as file:
        file.write(content)


def detect_format(path):
    """Recognize the format of a file by its content; "unknown" if it is none of these."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return "unknown"
    text = start.lstrip().lower()
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # damage causes errors of many types
            return "unknown"
        if any(name.endswith("data.pkl") for name in names):
            return "torch"
        return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"
    if len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
        return "safetensors"
    if path.lower().endswith(".index.json") and text.startswith(b"{"):
        return "index"
    if not start:
        return "empty"
    return next((name for magic, name in MAGIC_BYTES if text.startswith(magic)), "unknown")


def _refused_types(path, error):
    """List the types in a file that are not read, by the file itself or by the error of torch; empty if it is none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            types = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or damage
        types = []
    return sorted(set(types)) or re.findall(r"(?:GLOBAL|class|type) ([\w.]+\.[\w.]+)", str(error))[:1]


def _find_shards(path):
    """List the files that hold a model's weights together, if `path` is one of them or their index; else []."""
    folder, name = os.path.split(path)
    if match := SHARD_NAME.fullmatch(name):
        stem, count, ending = match.groups()
        names = [f"{stem}-{i:05d}-of-{count}{ending}" for i in range(1, int(count) + 1)]
    elif detect_format(path) == "index":
        try:
            with open(path, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            names = []
        if not names or any(not isinstance(name, str) or os.path.basename(name) != name for name in names):
            raise UserError(f"{path} is no index of the files of a model: it has no weight_map of file names")
    else:
        return []
    shards = [os.path.join(folder, name) for name in names]
    if absent := [shard for shard in shards if not os.path.isfile(shard)]:
        raise UserError(f"{path} belongs to a model of {len(shards)} files (shards), and {absent[0]} is not there. "
                        "Put all of them into one folder")
    return shards


def _describe_folder(path):
    """Say what a folder is that was given as a checkpoint, and what to name instead."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        return f"{path} is a folder that cannot be read ({error})"
    if names & {"model_index.json", "transformer"} or "diffusion_pytorch_model.safetensors" in names:
        return (f"{path} is a folder of a diffusers model, but not of a DiT. Name a checkpoint of train.py, or a "
                "folder of a DiTPipeline")
    if ".metadata" in names:
        return (f"{path} is a folder of a distributed checkpoint. Make one file of it: python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt")
    parent, folder = os.path.split(os.path.normpath(path))
    example = latest_checkpoint(parent if folder == "checkpoints" else path)
    inside = sorted(os.path.join(path, name) for name in names if name.lower().endswith((*ENDINGS, ".index.json")))
    example = example or (inside[-1] if inside else None)
    return f"{path} is a folder. " + (f"Name a file in it, such as {example}" if example else
                                      "It holds no checkpoint. Name a .pt or .safetensors file")


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
