"""A model as it was trained, ready to sample from: weights, codec, classes."""
import argparse
import os
from dataclasses import dataclass

import torch

import models

from . import checkpoint, checksum, latents, pretrained
from .errors import UserError


@dataclass
class TrainedModel:
    """What `load_trained` found in a checkpoint.

    model        in evaluation mode, on the device
    codec        from `runtime.latents`
    path         of the checkpoint
    class_names  of the data set it was trained on, or None where the checkpoint does not say
    name         as --model takes it, "DiT-XL/2"
    image_size   pixels
    weights      which were taken: "ema", "model" or "bare"
    step         optimiser steps, or None where the checkpoint does not say
    ema_decay    of the moving average, or None where the checkpoint does not say
    """

    model: torch.nn.Module
    codec: object
    path: str
    class_names: list
    name: str
    image_size: int
    weights: str
    step: int
    ema_decay: float = None

    @property
    def num_classes(self):
        """Classes that were trained: of a table of 1000, those that the data set had."""
        rows = self.model.y_embedder.num_classes
        return min(rows, len(self.class_names)) if self.class_names else rows

    def description(self):
        """What was loaded, in a line."""
        after = "" if self.step is None else f" after {self.step:,} steps"
        return (f"{self.path}: {self.weights} weights of {self.name}{after}, {self.num_classes} classes, "
                f"{self.image_size} pixels, VAE {self.codec.name}, {self.model.config['conditioning']} blocks")

    def record(self):
        """What makes its images what they are; plain values."""
        vae = getattr(self.codec, "vae", None)
        return dict(model=self.name, conditioning=self.model.config["conditioning"],
                    checkpoint=os.path.abspath(self.path),
                    weights_sha256=checksum.of_weights(self.model), weights=self.weights, step=self.step,
                    ema_decay=self.ema_decay if self.weights == "ema" else None, image_size=self.image_size,
                    num_classes=self.num_classes, vae=self.codec.name,
                    vae_sha256=vae and checksum.of_weights(vae))


def load_trained(path, model, image_size, num_classes, vae, given, device):
    """Build the model of a checkpoint, with its codec.

    path   a `.pt` or `.safetensors` file, or None: the published checkpoint that fits
    model, image_size, num_classes, vae  what the flags of these names say
    given  the names of the flags that the user typed. A checkpoint that says what it is wins over the others, and
           contradicts a typed one with an error; only a typed vae is followed, since another decoder may be wanted
    raise  UserError for a file that is none, flags that contradict it, weights that do not fit
    """
    path = pretrained.find_checkpoint(path or pretrained.published_name(model, image_size, num_classes))
    flags = dict(model=model, image_size=image_size, num_classes=num_classes, vae=vae)
    stored = checkpoint.load(path)
    state_dict, weights = checkpoint.weights_of(stored, path)
    config = stored.get("config") or {}
    flags = flags | _told_by(stored, flags, given, path)
    codec = latents.open_codec(flags["vae"], config.get("image_channels", 3), device)
    try:
        if "model" in config:  # written by our train.py: every size is in it
            model = models.DiT(**config["model"])
        elif flags["model"] not in models.DiT_models:
            raise UserError(f"{path} is of a model that this code does not know: {flags['model']}")
        else:
            model = models.DiT_models[flags["model"]](
                input_size=latents.latent_size(codec, flags["image_size"]), in_channels=codec.channels,
                num_classes=flags["num_classes"], **_seen_in(state_dict, flags["num_classes"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from None
    if codec.channels != model.in_channels:
        raise UserError(f"--vae {codec.name} makes latents of {codec.channels} channels, the model in {path} takes "
                        f"{model.in_channels}")
    checkpoint.load_weights(model, state_dict, path)
    return TrainedModel(model.to(device).eval(), codec, path, config.get("class_names"), flags["model"],
                        flags["image_size"], weights, stored.get("step"), _args(stored).get("ema_decay"))


def _seen_in(state_dict, num_classes):
    """What other people's weights tell of themselves: a null class, a learned variance, the block type."""
    table, output, patches = map(state_dict.get, (
        "y_embedder.embedding_table.weight", "final_layer.linear.weight", "x_embedder.proj.weight"))
    if table is None or output is None or patches is None:
        return {}  # `load_weights` will say what is missing
    return dict(class_dropout_prob=0.0 if len(table) == num_classes else 0.1,
                learn_sigma=len(output) != patches[0].numel(), conditioning=_block_type(state_dict, len(patches)))


def _block_type(state_dict, hidden_size):
    """The conditioning whose blocks have weights of these names and shapes; where none has, the published one."""
    found = {name.removeprefix("blocks.0."): value.shape for name, value in state_dict.items()
             if name.startswith("blocks.0.")}
    with torch.device("meta"):
        for conditioning, (_, block, _) in models.CONDITIONINGS.items():
            own = block(hidden_size, num_heads=1).state_dict()
            if found == {name: value.shape for name, value in own.items()}:
                return conditioning
    return "adaln-zero"


def _told_by(stored, flags, given, path):
    """What the checkpoint itself says of model, image_size, num_classes and vae; published ones keep it in `args`."""
    args = _args(stored)
    told = {name: args[name] for name in ("model", "image_size", "num_classes") if name in args}
    for name, value in told.items():
        if name in given and flags[name] != value:
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: {path} was trained with {value}; "
                            "leave the flag out")
    # The decoder is a matter of taste (the published sample.py takes another than training did), but where there was no
    # VAE, or one of the user's own, the checkpoint's is meant.
    own_codec = "config" in stored and "vae" in args and args["vae"] not in ("ema", "mse")
    return told | (dict(vae=args["vae"]) if own_codec and "vae" not in given else {})


def _args(stored):
    """The flags that a checkpoint was trained with, as a dictionary; published ones keep a namespace."""
    args = stored.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
