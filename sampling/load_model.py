"""Load a trained model, ready to sample from: weights, autoencoder, class names."""
import os
from dataclasses import dataclass

import torch

from autoencoder.vae import VAE, IdentityAutoencoder, load_autoencoder
from common import distributed
from common.checkpoint_io import is_checkpoint, load_checkpoint
from common.download import download
from common.errors import ArgumentError, UserError
from common.files import sha256_weights
from common.state_dicts import (
    check_finite,
    describe_young_average,
    find_non_finite,
    find_weights,
    load_weights,
    select_weights,
    unwrap_state_dict,
)
from sampling.architecture import ModelResolver
from sampling.checkpoint_metadata import as_dict, read_metadata
from sampling.diffusers_format import find_transformer, read_diffusers_folder
from sampling.other_models import refuse_other_models

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


def is_model(path):
    """Return whether a path is a checkpoint, or a folder of diffusers' DiT."""
    return is_checkpoint(path) or find_transformer(path) is not None


def read_checkpoint(path):
    """Read a checkpoint, or a folder of diffusers as one."""
    if os.path.isdir(path) and find_transformer(path):
        return read_diffusers_folder(path)
    return load_checkpoint(path)


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


def load_model(path, model, image_size, num_classes, vae, explicit_args, device, ema_decay=None, weights=None,
               log=distributed.print_rank0):
    """Build the model of a checkpoint, a .pt or .safetensors file, and load its autoencoder.

    The sizes of the model follow from its weights. An explicit argument that contradicts them is an error, stored flags
    that do are named; `vae` may be another one than in training. Without a path it is the published checkpoint of the
    other arguments. Of several averages, `ema_decay` chooses one, by default the first; `weights` is "ema" or "model",
    the raw weights. `log` is called with warnings.
    """
    path = find_checkpoint(published_checkpoint_name(model, image_size, num_classes) if path is None else path)
    checkpoint = read_checkpoint(path)
    metadata = read_metadata(as_dict(checkpoint))
    _log_ignored(path, metadata.ignored, log)
    sets = find_weights(checkpoint)
    if any(torch.is_tensor(value) and value.is_meta for _, values in sets for value in values.values()):
        raise UserError(f"{path} holds names and shapes of weights, but no values (tensors on the meta device). Save "
                        "the model again after its weights were loaded")
    refuse_other_models(as_dict(checkpoint), sets[0][1] if sets else {}, path, bool(metadata.architecture), log)
    state_dict, kind, ema_decay = _select_average(checkpoint, metadata, path, ema_decay, weights, log)
    raw_weights = next((weights for kind, weights in sets if kind == "model"), None)
    _check_finite(state_dict, path, raw_weights if kind == "ema" else None)

    flags = dict(model=model, image_size=image_size, num_classes=num_classes, vae=vae)
    resolver = ModelResolver(state_dict, metadata, path, flags, explicit_args)
    autoencoder = load_autoencoder(resolver.choose_vae(), metadata.image_channels, device)
    image_size = resolver.choose_image_size(autoencoder)
    network = resolver.build()
    if autoencoder.channels != network.in_channels:
        raise ArgumentError(f"this autoencoder has latents of {autoencoder.channels} channels, the model in {path} "
                            f"takes {network.in_channels}. Name that of its training, or none (pixels).",
                            vae=autoencoder.name)
    load_weights(network, state_dict, path)
    loaded = LoadedModel(network.to(device).eval(), autoencoder, path, metadata.class_names, resolver.name, image_size,
                         kind, metadata.step, ema_decay)
    _log_doubts(loaded, metadata, resolver, state_dict, raw_weights is not None, log)
    return loaded


def _select_average(checkpoint, metadata, path, ema_decay, weights, log):
    """Return the weights to sample with, their kind ("ema", "model", "bare"), and the decay of the average.

    Key `ema` holds the average of the first decay, key `extra_emas` those of the others, by decay.
    """
    state_dict, kind = select_weights(checkpoint, path, weights, log)
    first_decay = metadata.ema_decays[0] if metadata.ema_decays else None
    if ema_decay is None or (kind == "ema" and ema_decay == first_decay):
        return state_dict, kind, first_decay
    if weights == "model":
        raise ArgumentError("the raw weights are no average. Leave one of the two out.", weights=weights,
                            ema_decay=ema_decay)
    averages = as_dict(checkpoint.get("extra_emas"))
    extra = {str(decay): average for decay, average in averages.items() if as_dict(average)}
    if kind != "ema" or f"{ema_decay:g}" not in extra:
        decays = [f"{decay:g}" for decay in [first_decay] if kind == "ema" and decay is not None] + list(extra)
        raise ArgumentError(f"{path} has no such average; it has {', '.join(decays) or 'none of known decay'}. "
                            "Choose one of its averages, or leave this out.", ema_decay=ema_decay)
    return unwrap_state_dict(extra[f"{ema_decay:g}"]), kind, ema_decay


def _check_finite(state_dict, path, raw_weights):
    """Refuse an average, or weights, that is not finite, and say if there are raw weights which are."""
    remedy = "Use an earlier checkpoint."
    if raw_weights and find_non_finite(state_dict) and not find_non_finite(raw_weights):
        remedy += " The raw weights are finite: --weights model samples from them."
    check_finite(state_dict, path, remedy)


def _log_ignored(path, entries, log):
    if entries:
        log(f"WARNING: {path}: ignored, since they cannot be what they are called: {', '.join(entries)}")


def _log_doubts(loaded, metadata, resolver, state_dict, has_raw_weights, log):
    """Log what may not be as it should: unusable class names, wrong stored flags, a young average, a missing table."""
    if loaded.class_names and len(loaded.class_names) > loaded.model.config.num_classes:
        entry = f"'class_names' ({len(loaded.class_names)} names of {resolver.num_classes} classes)"
        _log_ignored(loaded.path, [entry], log)
        loaded.class_names = None
    if resolver.corrections:
        log(f"WARNING: {loaded.path}: by its weights {', '.join(resolver.corrections)} as its flags have it")
    if "pos_embed" not in state_dict:
        log(f"{loaded.path} has no table of positions (pos_embed): computed for {loaded.image_size} pixels")
    if loaded.weights == "ema" and loaded.step is not None and loaded.ema_decay and not metadata.ema_warmup:
        remedy = "; --weights model samples the raw weights" if has_raw_weights else ""
        if doubt := describe_young_average(loaded.ema_decay, loaded.step):
            log(f"WARNING: {doubt}{remedy}")
