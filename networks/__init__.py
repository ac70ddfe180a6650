"""Networks that are built from the pieces of models.py: `build_dit` makes a DiT of any block type.

    model = build_dit("DiT-XL/2", conditioning="in-context", num_classes=10)
    again = build_dit(**model_config(model))  # the same architecture, new weights

A checkpoint keeps `model_config`; `infer_conditioning` serves weights that came without one.
"""
from dataclasses import asdict

import torch

from models import DiT_models
from networks.block_types import CONDITIONINGS

__all__ = ["CONDITIONINGS", "build_dit", "infer_conditioning", "model_config"]


def build_dit(name=None, conditioning="adaln-zero", **config):
    """Build a DiT with its initial weights, or raise a ValueError if its sizes do not fit together.

    Args:
        name (str): A size in `models.DiT_models`, such as "DiT-XL/2". Default: the sizes are in `config`.
        conditioning (str): Block type, a key of CONDITIONINGS.
        **config: Fields of `models.DiTConfig`; they win over those that follow from `name`.
    """
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, not {conditioning!r}")
    if name is not None and name not in DiT_models:
        raise ValueError(f"model must be one of {', '.join(DiT_models)}, not {name!r}")
    sizes = DiT_models[name].keywords if name is not None else {}
    return CONDITIONINGS[conditioning](**sizes | config)


def model_config(model):
    """Return the arguments of `build_dit` that build a DiT's architecture again, as plain values."""
    return asdict(model.config) | dict(conditioning=model.conditioning)


def infer_conditioning(state_dict):
    """Return the block type whose weights have these names and shapes, or "adaln-zero"; several raise a ValueError."""
    prefix = "blocks.0."
    shapes = {name.removeprefix(prefix): value.shape for name, value in state_dict.items() if name.startswith(prefix)}
    hidden_size = len(state_dict["x_embedder.proj.weight"])
    with torch.device("meta"):
        blocks = {conditioning: model_class.block_class(hidden_size, num_heads=1).state_dict()
                  for conditioning, model_class in CONDITIONINGS.items()}
    matches = [conditioning for conditioning, block in blocks.items()
               if shapes == {name: value.shape for name, value in block.items()}]
    if len(matches) > 1:
        raise ValueError(f"these weights fit the block types {', '.join(matches)}: only a checkpoint's configuration "
                         "can tell them apart")
    return matches[0] if matches else "adaln-zero"
