"""A model as it was trained, ready to sample from: weights, codec, classes."""
from dataclasses import dataclass

import torch

import models

from . import checkpoint, latents
from .errors import UserError


@dataclass
class TrainedModel:
    """What `load_trained` found in a checkpoint.

    model        in evaluation mode, on the device
    codec        from `runtime.latents`
    class_names  of the data set it was trained on, or None where the checkpoint does not say
    name         as --model takes it, "DiT-XL/2"
    image_size   pixels
    weights      which were taken: "ema", "model" or "bare"
    step         optimiser steps, or None where the checkpoint does not say
    """

    model: torch.nn.Module
    codec: object
    class_names: list
    name: str
    image_size: int
    weights: str
    step: int

    def description(self):
        """What was loaded, in a line."""
        after = "" if self.step is None else f" after {self.step:,} steps"
        return (f"{self.weights} weights of {self.name}{after}, {self.model.y_embedder.num_classes} classes, "
                f"{self.image_size} pixels, VAE {self.codec.name}")


def load_trained(path, flags, given, device):
    """Build the model of a checkpoint, with its codec.

    path   a `.pt` or `.safetensors` file
    flags  what the command line says: a dictionary with model, image_size, num_classes, vae
    given  the names among them that the user typed. A checkpoint that says what it is wins over the other flags, and
           contradicts a typed one with an error; only a typed vae is followed, since another decoder may be wanted
    raise  UserError for a file that is none, flags that contradict it, weights that do not fit
    """
    stored = checkpoint.load(path)
    state_dict, weights = checkpoint.weights_of(stored, path)
    config = stored.get("config") or {}
    flags = flags | _told_by(stored, flags, given, path)
    codec = latents.open_codec(flags["vae"], config.get("image_channels", 3), device)
    try:
        if "model" in config:  # written by our train.py: every size is in it
            model = models.DiT(**config["model"])
        else:
            model = models.DiT_models[flags["model"]](
                input_size=latents.latent_size(codec, flags["image_size"]), in_channels=codec.channels,
                num_classes=flags["num_classes"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from None
    if codec.channels != model.in_channels:
        raise UserError(f"--vae {codec.name} makes latents of {codec.channels} channels, the model in {path} takes "
                        f"{model.in_channels}")
    checkpoint.load_weights(model, state_dict, path)
    return TrainedModel(model.to(device).eval(), codec, config.get("class_names"), flags["model"], flags["image_size"],
                        weights, stored.get("step"))


def _told_by(stored, flags, given, path):
    """What the checkpoint itself says of model, image_size, num_classes and vae; published ones keep it in `args`."""
    args = stored.get("args") or {}
    args = args if isinstance(args, dict) else vars(args)
    told = {name: args[name] for name in ("model", "image_size", "num_classes") if name in args}
    for name, value in told.items():
        if name in given and flags[name] != value:
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: {path} was trained with {value}; "
                            "leave the flag out")
    # The decoder is a matter of taste (the published sample.py takes another than training did), but where there was no
    # VAE, or one of the user's own, the checkpoint's is meant.
    own_codec = "config" in stored and args.get("vae") not in ("ema", "mse")
    return told | (dict(vae=args["vae"]) if own_codec and "vae" not in given else {})
