"""Autoencoders: between pixels and the latents that the DiT works on.

The only module that knows the scale, shift, channels and stride of a VAE.
"""
import functools
import os
from dataclasses import dataclass

import torch

from common.errors import ArgumentError, UserError
from common.files import sha256_weights

# The VAEs of the paper: Stable Diffusion's with two fine-tuned decoders (table 5).
VAE_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
DECODE_BATCH_SIZE = 16
MAX_SCALE = 1e6  # scales and deviations lie in 1 / MAX_SCALE .. MAX_SCALE


@dataclass(frozen=True)
class LatentScaling:
    """Size of a VAE's latents, and how they are scaled for the DiT: scaled = (latent - shift) * scale."""

    channels: int
    stride: int  # pixels per latent, along each side
    scale: float | list[float]  # one number, or one per channel
    shift: float | list[float]
    image_channels: int = 3

    def draw(self, moments, noise):
        """Draw scaled latents from the posterior N(mean, exp(log_var)).

        Args:
            moments (Tensor): Mean, then log_var, shape (N, 2C, h, w), any floating type.
            noise (Tensor): Standard normal noise, shape (N, C, h, w).

        Returns:
            Tensor: Scaled latents, shape (N, C, h, w), float32.
        """
        mean, log_var = moments.float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_var) * noise
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def unscale(self, latents):
        """Convert latents of the DiT, shape (N, C, h, w), to those that the VAE's decoder takes."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)


def _per_channel(value, like):
    """Return a number as it is, and one number per channel as a tensor of shape (C, 1, 1)."""
    return value if isinstance(value, (int, float)) else _channel_tensor(tuple(value), like.device)


@functools.cache
def _channel_tensor(values, device):
    return torch.tensor(values, device=device)[:, None, None]


class IdentityAutoencoder:
    """No VAE: the DiT works on pixels in [-1, 1]."""

    name = "none"
    stride = 1
    is_random = False  # encoding draws no noise

    def __init__(self, channels):
        self.channels = self.image_channels = channels

    def metadata(self):
        """Describe what makes the latents; plain values."""
        return dict(vae="none")

    def encode(self, images, noise=None):
        """Return images in [-1, 1], shape (N, C, H, W), as they are."""
        return images

    def decode(self, latents):
        """Return latents as they are; nothing confines them to [-1, 1]."""
        return latents


class _ScaledAutoencoder:
    """What `VAE` and `CachedLatents` share: names and sizes, by a `LatentScaling`."""

    is_random = True  # encoding draws from a posterior

    def __init__(self, name, latent_scaling):
        self.name, self.latent_scaling = name, latent_scaling
        self.channels, self.stride = latent_scaling.channels, latent_scaling.stride
        self.image_channels = latent_scaling.image_channels

    def metadata(self):
        """Describe what makes the latents; plain values."""
        return dict(vae_sha256=self.encoder_sha256, **vars(self.latent_scaling))


class VAE(_ScaledAutoencoder):
    """A frozen diffusers `AutoencoderKL`; its name is what `load_autoencoder` takes."""

    def __init__(self, name, vae):
        super().__init__(name, _read_latent_scaling(name, vae.config))
        self.vae = vae.eval().requires_grad_(False)

    @property
    def encoder_sha256(self):
        """Hash of all weights that latents depend on: VAEs that differ in the decoder alone share it."""
        return sha256_weights(*(part for part in (self.vae.encoder, self.vae.quant_conv) if part is not None))

    @torch.no_grad()
    def moments(self, images):
        """Encode images in [-1, 1], shape (N, C, H, W): mean, then log_var, shape (N, 2C, H / stride, W / stride)."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def encode(self, images, noise):
        """Draw scaled latents from the posterior of images, with `noise` of the latents' shape."""
        return self.latent_scaling.draw(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents):
        """Decode scaled latents, shape (N, C, h, w), to (N, 3, h * stride, w * stride), about in [-1, 1]."""
        # In parts: at 512 pixels one activation of the decoder takes 0.3 GB per image.
        parts = self.latent_scaling.unscale(latents).split(DECODE_BATCH_SIZE)
        return torch.cat([self.vae.decode(part).sample for part in parts])


class CachedLatents(_ScaledAutoencoder):
    """The autoencoder of a latent cache: encoding draws from moments that a VAE, whose name it has, computed earlier.

    `vae` is what decodes, or None if nothing is decoded.
    """

    def __init__(self, name, latent_scaling, encoder_sha256, vae=None):
        super().__init__(name, latent_scaling)
        self.encoder_sha256, self.vae = encoder_sha256, vae

    def encode(self, moments, noise):
        """Draw scaled latents, shape (N, C, h, w), from moments, shape (N, 2C, h, w)."""
        return self.latent_scaling.draw(moments, noise)

    def decode(self, latents):
        """Decode scaled latents by the VAE."""
        return self.vae.decode(latents)


def _read_latent_scaling(name, config):
    """Read the `LatentScaling` from the configuration of the `AutoencoderKL` of this name, and check its numbers."""
    def error(problem):
        return ArgumentError(f"its config.json cannot be used: {problem}. Correct it", vae=name)

    def check(field, value, is_scale=False):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (value >= 1 / MAX_SCALE if is_scale else value >= -MAX_SCALE) or value > MAX_SCALE:
            raise error(f"{field} is {value!r}, not a number from {1 / MAX_SCALE if is_scale else -MAX_SCALE:g} to "
                        f"{MAX_SCALE:g}")
        return value

    def read_channels(field, is_scale=False):
        try:
            values = torch.tensor(getattr(config, field)).flatten().tolist()
        except (TypeError, ValueError, RuntimeError):
            raise error(f"{field} is not a list of numbers") from None
        if len(values) != config.latent_channels:
            raise error(f"{field} has {len(values)} numbers for {config.latent_channels} channels")
        return [check(field, value, is_scale) for value in values]

    scale = check("scaling_factor", config.scaling_factor, is_scale=True)
    shift = check("shift_factor", getattr(config, "shift_factor", None) or 0.0)
    fields = [field for field in ("latents_mean", "latents_std") if getattr(config, field, None) is not None]
    if len(fields) == 1:
        raise error(f"it has {fields[0]}, but not both of latents_mean and latents_std")
    if fields:  # some VAEs normalize each channel, then scale
        means, stds = read_channels("latents_mean"), read_channels("latents_std", is_scale=True)
        scale, shift = [scale / std for std in stds], [mean + shift for mean in means]
    return LatentScaling(channels=config.latent_channels, stride=2 ** (len(config.block_out_channels) - 1),
                         scale=scale, shift=shift, image_channels=config.in_channels)


def latent_size(autoencoder, image_size):
    """Return the number of latents a side for images of `image_size` pixels a side."""
    if image_size % autoencoder.stride:
        raise ArgumentError(f"not a multiple of {autoencoder.stride}, the pixels per latent of the VAE "
                            f"{autoencoder.name}", image_size=image_size)
    return image_size // autoencoder.stride


def load_autoencoder(vae, channels=3, device="cpu"):
    """Load a VAE, or the `IdentityAutoencoder`.

    Args:
        vae (str): "ema" or "mse" (the paper's), a directory written by diffusers' `save_pretrained`, another name on
            the Hugging Face hub, with a folder in it if needed ("OWNER/MODEL/vae"), or "none" for pixels.
        channels (int): Channels of the images.
        device (torch.device): Where the weights are needed.

    Raises:
        ArgumentError: If it cannot be loaded, or takes images of other channels.
    """
    if vae == "none":
        return IdentityAutoencoder(channels)
    from diffusers import AutoencoderKL
    source = VAE_NAMES.get(vae, vae)
    is_local = os.path.isdir(source)
    if not is_local and (os.path.isabs(source) or "/" not in source):
        raise ArgumentError(f"there is no such folder. Name one, one of {', '.join(VAE_NAMES)}, OWNER/MODEL on the "
                            "Hugging Face hub, or none (pixels)", vae=vae)
    repository, folder = (source, None) if is_local else _split_hub_name(source)
    try:
        network = AutoencoderKL.from_pretrained(repository, subfolder=folder).to(device)
        autoencoder = VAE(vae, network)
    except UserError:
        raise
    except Exception as error:  # what is not a VAE fails in many ways
        if is_local:
            advice = "The folder must hold config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL"
        else:
            advice = f"Without a network, fetch https://huggingface.co/{repository} elsewhere and pass its directory"
        raise ArgumentError(f"cannot be loaded ({_first_line(error)}). {advice}", vae=vae) from None
    if autoencoder.image_channels != channels:
        raise ArgumentError(f"it takes images of {autoencoder.image_channels} channels, this data has {channels}. "
                            "The name none stands for working on the pixels", vae=vae)
    return autoencoder


def load_cached_latents(cache, vae=None, image_size=None, device="cpu", needs_decoder=False):
    """Build the `CachedLatents` of a latent cache, after checking that the cache is what the user asked for.

    Args:
        cache (LatentCache): The cache.
        vae (str): The VAE that the user named, if any.
        image_size (int): The image size that the user named, if any.
        device (torch.device): Where the decoder is needed.
        needs_decoder (bool): Whether to load the VAE, to decode with.

    Raises:
        ArgumentError: If the cache was made with another VAE or for another size, or the VAE cannot be loaded.
    """
    latent_scaling, encoder_sha256 = LatentScaling(**cache.latent_scaling), cache.encoder_sha256
    if image_size not in (None, cache.image_size):
        raise ArgumentError(f"the cache {cache.folder} is of images of {cache.image_size} pixels",
                            image_size=image_size)
    name, made_with = vae or cache.autoencoder_name, f"the cache {cache.folder} was made with {cache.autoencoder_name}"
    # A name on the hub stands for the same weights as when the cache was made; a directory may hold others.
    if not needs_decoder and name == cache.autoencoder_name and not (vae and os.path.isdir(name)):
        return CachedLatents(name, latent_scaling, encoder_sha256)
    try:
        autoencoder = load_autoencoder(name, cache.channels, device if needs_decoder else "cpu")
    except UserError as error:
        remedy = "" if vae else ". If it was moved, pass its new place; it is only needed to decode samples"
        raise ArgumentError(f"{error.args[0]} ({made_with}){remedy}", vae=name) from None
    if not autoencoder.is_random:
        raise ArgumentError(made_with, vae=name)
    if autoencoder.encoder_sha256 != encoder_sha256:
        raise ArgumentError(f"another VAE (weights {autoencoder.encoder_sha256[:12]}): {made_with} "
                            f"({encoder_sha256[:12]})", vae=name)
    if autoencoder.latent_scaling != latent_scaling:
        raise ArgumentError(f"it has {autoencoder.latent_scaling}, {made_with} and {latent_scaling}", vae=name)
    return CachedLatents(name, latent_scaling, encoder_sha256, autoencoder if needs_decoder else None)


def _split_hub_name(name):
    """Split "OWNER/MODEL/FOLDER" into ("OWNER/MODEL", "FOLDER"); the folder is None if there is none."""
    owner, *rest = name.split("/", 2)
    return "/".join([owner, *rest[:1]]), rest[1] if len(rest) > 1 else None


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
