"""What a checkpoint holds in addition to its weights; types and ranges are checked here, once."""
import argparse
import dataclasses

import torch

STEP_NAMES = ("step", "steps", "train_steps", "global_step", "iteration")  # ours first, then those of other projects


@dataclasses.dataclass
class CheckpointMetadata:
    """Plain values of a checkpoint; None is unknown, or unusable and then named in `ignored`."""

    architecture: dict                # arguments of `build_dit`, which train.py stores; empty in files of others
    model: str | None                 # the flags that it was trained with
    image_size: int | None
    num_classes: int | None
    vae: str | None
    num_heads: int | None
    ema_decays: list[float]           # of `ema`, then of `extra_emas`
    ema_warmup: bool
    step: int | None                  # optimizer steps
    class_names: list[str] | None
    image_channels: int
    ignored: list[str]                # entries of a type or range that they cannot have


def read_metadata(checkpoint):
    """Read the `CheckpointMetadata` of a checkpoint; numbers may be stored as floats, text or tensors."""
    ignored = []

    def take(source, name, convert):
        value = source.get(name)
        result = None if value is None else convert(value)
        if value is not None and result is None:
            ignored.append(f"{name!r} ({_shorten(value)})")
        return result

    args = as_dict(checkpoint.get("args")) or as_dict(checkpoint.get("hyper_parameters"))
    config = as_dict(checkpoint.get("config"))
    step_name = next((name for name in STEP_NAMES if checkpoint.get(name) is not None), "step")
    stored = as_dict(config.get("model"))
    architecture = {name: take(stored, name, convert) for name, convert in ARCHITECTURE_FIELDS.items()}
    architecture = {name: value for name, value in architecture.items() if value is not None}
    return CheckpointMetadata(
        architecture=architecture, model=take(args, "model", _as_text), image_size=take(args, "image_size", as_count),
        num_classes=take(args, "num_classes", as_count), vae=take(args, "vae", _as_text),
        num_heads=take(args, "num_heads", as_count), ema_decays=take(args, "ema_decay", _as_decays) or [],
        ema_warmup=bool(as_number(args.get("ema_warmup"))), step=take(checkpoint, step_name, as_integer),
        class_names=take(config, "class_names", _as_names),
        image_channels=take(config, "image_channels", as_count) or 3, ignored=ignored)


def as_dict(value):
    """Return the dictionary of a namespace or of a dictionary; anything else is an empty one."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def as_number(value):
    """Return a float if `value` is a number, also as text or as a tensor of one element, else None."""
    if torch.is_tensor(value):
        value = value.item() if value.numel() == 1 and not value.is_complex() else None
    try:
        return float(value) if isinstance(value, (bool, int, float, str)) else None
    except (ValueError, OverflowError):
        return None


def as_integer(value):
    """Return an int from 0 to 2^53 if `value` is one in whatever form, else None."""
    number = as_number(value)
    is_integer = number is not None and not isinstance(value, bool) and number.is_integer() and 0 <= number <= 2**53
    return int(number) if is_integer else None


def as_count(value):
    """Return an int of at least 1 if `value` is one in whatever form, else None."""
    return as_integer(value) or None


def _as_fraction(value):
    number = as_number(value)
    return number if number is not None and 0 <= number <= 1 else None


def _as_size(value):
    """Return a side, or (height, width)."""
    if not isinstance(value, (list, tuple)):
        return as_count(value)
    sides = tuple(as_count(side) for side in value)
    return sides if len(sides) == 2 and None not in sides else None


def _as_text(value):
    return value if isinstance(value, str) and value else None


def _as_names(value):
    names = value if isinstance(value, (list, tuple)) else []
    is_usable = names and all(isinstance(name, (str, int)) for name in names)
    return [str(name) for name in names] if is_usable else None


def _as_decays(value):
    decays = [as_number(decay) for decay in (value if isinstance(value, (list, tuple)) else [value])]
    return decays if decays and all(decay is not None and 0 <= decay < 1 for decay in decays) else None


def _shorten(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


# Arguments of `build_dit` as train.py stores them, and how they are read.
ARCHITECTURE_FIELDS = dict(
    input_size=_as_size, patch_size=as_count, in_channels=as_count, hidden_size=as_count, depth=as_count,
    num_heads=as_count, mlp_ratio=as_number, class_dropout_prob=_as_fraction, num_classes=as_count,
    learn_sigma=lambda value: value if isinstance(value, bool) else None, conditioning=_as_text)
