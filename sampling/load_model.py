"""Load a trained model, ready to sample from: weights, autoencoder, class names."""
import argparse
import os
from dataclasses import dataclass

import torch

import models
from autoencoder.vae import VAE, IdentityAutoencoder, latent_size, load_autoencoder
from common.checkpoint_io import load_checkpoint
from common.download import download
from common.errors import ArgumentError, UserError
from common.files import sha256_weights
from common.state_dicts import load_weights, select_weights
from networks import build_dit, infer_conditioning

PUBLISHED_CHECKPOINTS = ("DiT-XL-2-512x512.pt", "DiT-XL-2-256x256.pt")
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"


def published_checkpoint_name(model, image_size, num_classes):
    """Return the name of the published checkpoint of a model, or raise an `ArgumentError` if there is none."""
    if model != "DiT-XL/2" or image_size not in (256, 512) or num_classes != 1000:
        raise ArgumentError("no such weights are published, only those of DiT-XL/2 with 1000 classes at 256 and 512 "
                            "pixels. Name a checkpoint of this model.", model=model, image_size=image_size,
                            num_classes=num_classes)
    return f"DiT-XL-2-{image_size}x{image_size}.pt"


def find_checkpoint(name):
    """Return the path of a checkpoint, after downloading it to `pretrained_models/` if it is a published one."""
    if name in PUBLISHED_CHECKPOINTS and not os.path.exists(name):
        return download(name, PUBLISHED_URL)
    return name


def find_model(name):
    """Return the state dictionary of a checkpoint (a published one is downloaded), and print which weights it took.

    Of a training checkpoint, these are the EMA weights.
    """
    path = find_checkpoint(name)
    state_dict, kind = select_weights(load_checkpoint(path), path)
    print(f"{path}: {kind} weights")
    return state_dict


@dataclass
class LoadedModel:
    """A model of a checkpoint, with all that is known about it; None is unknown."""

    model: torch.nn.Module                  # a DiT in evaluation mode, on its device
    autoencoder: VAE | IdentityAutoencoder  # decodes its latents
    path: str                               # of the checkpoint
    class_names: list[str] | None           # of its data set
    name: str                               # architecture, such as "DiT-XL/2"
    image_size: int                         # pixels
    weights: str                            # which weights were taken: "ema", "model" or "bare"
    step: int | None                        # optimizer steps
    ema_decay: float | None = None          # decay of the moving average

    @property
    def num_classes(self):
        """Number of classes with training data, which can be fewer than the rows of the class table."""
        rows = self.model.config.num_classes
        return min(rows, len(self.class_names)) if self.class_names else rows

    def description(self):
        """Return a line about what was loaded."""
        after = "" if self.step is None else f" after {self.step:,} steps"
        return (f"{self.path}: {self.weights} weights of {self.name}{after}, {self.num_classes} classes, "
                f"{self.image_size} pixels, VAE {self.autoencoder.name}, {self.model.conditioning} blocks")

    def metadata(self):
        """Return all that its images depend on; plain values."""
        vae = getattr(self.autoencoder, "vae", None)
        return dict(model=self.name, conditioning=self.model.conditioning, checkpoint=os.path.abspath(self.path),
                    weights_sha256=sha256_weights(self.model), weights=self.weights, step=self.step,
                    ema_decay=self.ema_decay if self.weights == "ema" else None, image_size=self.image_size,
                    num_classes=self.num_classes, vae=self.autoencoder.name,
                    vae_sha256=vae and sha256_weights(vae))


def load_model(path, model, image_size, num_classes, vae, explicit_args, device, ema_decay=None):
    """Build the model of a checkpoint, a .pt or .safetensors file, and load its autoencoder.

    A checkpoint of train.py stores its configuration, which takes precedence over the arguments; an explicit argument
    that contradicts it is an error, except `vae`: another decoder may be wanted. Without a path it is the published
    checkpoint of the other arguments. `ema_decay` chooses one of several averages, by default the first.
    """
    path = find_checkpoint(path or published_checkpoint_name(model, image_size, num_classes))
    checkpoint = load_checkpoint(path)
    state_dict, weights, ema_decay = _select_average(checkpoint, path, ema_decay)
    config = checkpoint.get("config") or {}
    options = _resolve_options(checkpoint, path, explicit_args, model=model, image_size=image_size,
                               num_classes=num_classes, vae=vae)
    autoencoder = load_autoencoder(options["vae"], config.get("image_channels", 3), device)
    network = _build_model(config, state_dict, options, autoencoder, path)
    if autoencoder.channels != network.in_channels:
        raise ArgumentError(f"this autoencoder has latents of {autoencoder.channels} channels, the model in {path} "
                            f"takes {network.in_channels}.", vae=autoencoder.name)
    load_weights(network, state_dict, path)
    return LoadedModel(network.to(device).eval(), autoencoder, path, config.get("class_names"), options["model"],
                       options["image_size"], weights, checkpoint.get("step"), ema_decay)


def _build_model(config, state_dict, options, autoencoder, path):
    """Build the network of a checkpoint: from its configuration, or from the options and the shapes of its weights."""
    try:
        if "model" in config:
            return build_dit(**config["model"])
        if options["model"] not in models.DiT_models:
            raise UserError(f"{path} is a checkpoint of an unknown model: {options['model']}")
        return build_dit(
            options["model"], input_size=latent_size(autoencoder, options["image_size"]),
            in_channels=autoencoder.channels, num_classes=options["num_classes"],
            **_infer_options(state_dict, options["num_classes"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from None


def _infer_options(state_dict, num_classes):
    """Infer null class, learned variance and block type from the weights of a foreign checkpoint."""
    table = state_dict.get("y_embedder.embedding_table.weight")
    output = state_dict.get("final_layer.linear.weight")
    patches = state_dict.get("x_embedder.proj.weight")
    if table is None or output is None or patches is None:
        return {}  # `load_weights` reports what is missing
    return dict(class_dropout_prob=0.0 if len(table) == num_classes else 0.1,
                learn_sigma=len(output) != patches[0].numel(), conditioning=infer_conditioning(state_dict))


# ---------------------------------------------------------------- what a checkpoint stores

def _select_average(checkpoint, path, ema_decay):
    """Return the weights to sample with, their kind ("ema", "model", "bare"), and the decay of the average.

    Key `ema` holds the average of the first decay, key `extra_emas` those of the others, by decay.
    """
    state_dict, kind = select_weights(checkpoint, path)
    stored = _stored_args(checkpoint).get("ema_decay")
    first_decay = stored[0] if isinstance(stored, list) else stored
    if ema_decay is None or (kind == "ema" and ema_decay == first_decay):
        return state_dict, kind, first_decay
    extra = checkpoint.get("extra_emas") or {}
    if kind != "ema" or f"{ema_decay:g}" not in extra:
        decays = [f"{decay:g}" for decay in [first_decay] if kind == "ema" and decay is not None] + list(extra)
        raise ArgumentError(f"{path} has no such average; it has {', '.join(decays) or 'none of known decay'}. "
                            "Choose one of its averages, or leave this out.", ema_decay=ema_decay)
    state_dict, _ = select_weights(dict(ema=extra[f"{ema_decay:g}"]), path)
    return state_dict, kind, ema_decay


def _resolve_options(checkpoint, path, explicit_args, **options):
    """Return the options, replaced by those that the checkpoint was trained with."""
    args = _stored_args(checkpoint)
    stored = {name: args[name] for name in ("model", "image_size", "num_classes") if name in args}
    for name, value in stored.items():
        if name in explicit_args and options[name] != value:
            raise ArgumentError(f"{path} was trained with {value}. Leave this out.", **{name: options[name]})
    # The published sample.py takes another decoder than training did; other autoencoders cannot be exchanged.
    if "config" in checkpoint and "vae" not in explicit_args and args.get("vae", "ema") not in ("ema", "mse"):
        stored["vae"] = args["vae"]
    return options | stored


def _stored_args(checkpoint):
    """Return the flags that a checkpoint was trained with; published ones store a namespace."""
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return args if isinstance(args, dict) else {}
