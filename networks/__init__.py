"""Networks that are built from the pieces of models.py: `build_dit` makes a DiT of any block type.

    model = build_dit("DiT-XL/2", conditioning="in-context", num_classes=10)
    again = build_dit(**model_config(model))  # the same architecture, new weights

A checkpoint keeps `model_config`; `infer_config` serves weights that came without one.
"""
from dataclasses import asdict

import torch

from models import DiT_models
from networks.block_types import CONDITIONINGS

__all__ = ["CONDITIONINGS", "build_dit", "infer_conditioning", "infer_config", "model_config"]


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


def infer_config(state_dict):
    """Return the arguments of `build_dit` that the names and shapes of a DiT's weights tell.

    These are all but the number of heads, the size of the latents, and which rows of the class table are classes.
    """
    shape = state_dict["x_embedder.proj.weight"].shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"x_embedder.proj.weight has the shape {tuple(shape)}, not that of square patches")
    hidden_size, in_channels, patch_size, _ = shape
    depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    if not depth:
        raise ValueError("there are no blocks (blocks.0...)")
    mlp_size = len(state_dict.get("blocks.0.mlp.fc1.weight", range(4 * hidden_size)))
    output_size = len(state_dict.get("final_layer.linear.weight", range(2 * in_channels * patch_size**2)))
    mlp_ratio = mlp_size / hidden_size
    if int(hidden_size * mlp_ratio) != mlp_size:  # rounding
        mlp_ratio = (mlp_size + 0.5) / hidden_size
    return dict(hidden_size=hidden_size, in_channels=in_channels, patch_size=patch_size, depth=depth,
                mlp_ratio=mlp_ratio, learn_sigma=output_size != in_channels * patch_size**2,
                conditioning=infer_conditioning(state_dict, mlp_ratio))


def infer_conditioning(state_dict, mlp_ratio=4.0):
    """Return the block type whose weights have these names and shapes, or "adaln-zero"; several raise a ValueError."""
    prefix = "blocks.0."
    shapes = {name.removeprefix(prefix): value.shape for name, value in state_dict.items() if name.startswith(prefix)}
    hidden_size = len(state_dict["x_embedder.proj.weight"])
    with torch.device("meta"):
        blocks = {conditioning: model_class.block_class(hidden_size, num_heads=1, mlp_ratio=mlp_ratio).state_dict()
                  for conditioning, model_class in CONDITIONINGS.items()}
    matches = [conditioning for conditioning, block in blocks.items()
               if shapes == {name: value.shape for name, value in block.items()}]
    if len(matches) > 1:
        raise ValueError(f"these weights fit the block types {', '.join(matches)}: only a checkpoint's configuration "
                         "can tell them apart")
    return matches[0] if matches else "adaln-zero"
