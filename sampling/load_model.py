"""Load a trained model, ready to sample from: weights, autoencoder, class names."""
import argparse
import os
from dataclasses import dataclass

import torch

import models
from autoencoder.vae import latent_size, load_autoencoder
from common.checkpoint_io import load_checkpoint, load_weights, select_weights
from common.download import download
from common.errors import UserError
from common.files import sha256_weights
from networks import build_dit, infer_conditioning

PUBLISHED_CHECKPOINTS = ("DiT-XL-2-512x512.pt", "DiT-XL-2-256x256.pt")
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"


def published_checkpoint_name(model_name, image_size, num_classes):
    """The published checkpoint that fits these flags; a `UserError` where there is none."""
    if model_name != "DiT-XL/2" or image_size not in (256, 512) or num_classes != 1000:
        raise UserError("there are published weights of DiT-XL/2 alone, at --image-size 256 and 512 with 1000 classes, "
                        f"not of {model_name} at {image_size} with {num_classes}: name yours with --ckpt")
    return f"DiT-XL-2-{image_size}x{image_size}.pt"


def find_checkpoint(name):
    """The path of a checkpoint: a published name is downloaded to `pretrained_models/` first if need be."""
    if name in PUBLISHED_CHECKPOINTS and not os.path.exists(name):
        return download(name, PUBLISHED_URL)
    return name


def find_model(name):
    """State dictionary of a published checkpoint (downloaded if need be), or of a `.pt` or `.safetensors` file.

    A training checkpoint gives its EMA weights; which weights were taken is printed.
    """
    path = find_checkpoint(name)
    state_dict, which = select_weights(load_checkpoint(path), path)
    print(f"{path}: {which} weights")
    return state_dict


@dataclass
class LoadedModel:
    """What `load_model` found in a checkpoint.

    model        in evaluation mode, on the device
    codec        from `autoencoder.vae`
    path         of the checkpoint
    class_names  of the data set it was trained on, or None where the checkpoint does not say
    name         as --model takes it, "DiT-XL/2"
    image_size   pixels
    weights      which were taken: "ema", "model" or "bare"
    step         optimiser steps, or None where the checkpoint does not say
    ema_decay    of the moving average, or None where the checkpoint does not say
    """

    model: torch.nn.Module
    autoencoder: object
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
                f"{self.image_size} pixels, VAE {self.autoencoder.name}, {self.model.conditioning} blocks")

    def metadata(self):
        """What makes its images what they are; plain values."""
        vae = getattr(self.autoencoder, "vae", None)
        return dict(model=self.name, conditioning=self.model.conditioning,
                    checkpoint=os.path.abspath(self.path),
                    weights_sha256=sha256_weights(self.model), weights=self.weights, step=self.step,
                    ema_decay=self.ema_decay if self.weights == "ema" else None, image_size=self.image_size,
                    num_classes=self.num_classes, vae=self.autoencoder.name,
                    vae_sha256=vae and sha256_weights(vae))


def load_model(path, model, image_size, num_classes, vae, given, device):
    """Build the model of a checkpoint, with its codec.

    path   a `.pt` or `.safetensors` file, or None: the published checkpoint that fits
    model, image_size, num_classes, vae  what the flags of these names say
    given  the names of the flags that the user typed. A checkpoint that says what it is wins over the others, and
           contradicts a typed one with an error; only a typed vae is followed, since another decoder may be wanted
    raise  UserError for a file that is none, flags that contradict it, weights that do not fit
    """
    path = find_checkpoint(path or published_checkpoint_name(model, image_size, num_classes))
    flags = dict(model=model, image_size=image_size, num_classes=num_classes, vae=vae)
    stored = load_checkpoint(path)
    state_dict, weights = select_weights(stored, path)
    config = stored.get("config") or {}
    flags = flags | _stored_options(stored, flags, given, path)
    autoencoder = load_autoencoder(flags["vae"], config.get("image_channels", 3), device)
    try:
        if "model" in config:  # written by our train.py: every size is in it
            model = build_dit(**config["model"])
        elif flags["model"] not in models.DiT_models:
            raise UserError(f"{path} is of a model that this code does not know: {flags['model']}")
        else:
            model = build_dit(
                flags["model"], input_size=latent_size(autoencoder, flags["image_size"]),
                in_channels=autoencoder.channels, num_classes=flags["num_classes"],
                **_infer_options(state_dict, flags["num_classes"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from None
    if autoencoder.channels != model.in_channels:
        raise UserError(f"--vae {autoencoder.name} makes latents of {autoencoder.channels} channels, the model in {path} takes "
                        f"{model.in_channels}")
    load_weights(model, state_dict, path)
    return LoadedModel(model.to(device).eval(), autoencoder, path, config.get("class_names"), flags["model"],
                        flags["image_size"], weights, stored.get("step"), _stored_args(stored).get("ema_decay"))


def _infer_options(state_dict, num_classes):
    """What other people's weights tell of themselves: a null class, a learned variance, the block type."""
    table, output, patches = map(state_dict.get, (
        "y_embedder.embedding_table.weight", "final_layer.linear.weight", "x_embedder.proj.weight"))
    if table is None or output is None or patches is None:
        return {}  # `load_weights` will say what is missing
    return dict(class_dropout_prob=0.0 if len(table) == num_classes else 0.1,
                learn_sigma=len(output) != patches[0].numel(), conditioning=infer_conditioning(state_dict))


def _stored_options(stored, flags, given, path):
    """What the checkpoint itself says of model, image_size, num_classes and vae; published ones keep it in `args`."""
    args = _stored_args(stored)
    told = {name: args[name] for name in ("model", "image_size", "num_classes") if name in args}
    for name, value in told.items():
        if name in given and flags[name] != value:
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: {path} was trained with {value}; "
                            "leave the flag out")
    # The decoder is a matter of taste (the published sample.py takes another than training did), but where there was no
    # VAE, or one of the user's own, the checkpoint's is meant.
    own_codec = "config" in stored and "vae" in args and args["vae"] not in ("ema", "mse")
    return told | (dict(vae=args["vae"]) if own_codec and "vae" not in given else {})


def _stored_args(stored):
    """The flags that a checkpoint was trained with, as a dictionary; published ones keep a namespace."""
    args = stored.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
