"""Between pixels and what the DiT sees. The one place that knows a VAE's scale, shift, channels and stride."""

import functools
import os
from dataclasses import dataclass

import torch

from common.errors import UserError
from common.files import sha256_weights

# The VAEs of the paper: Stable Diffusion's, its decoder fine-tuned (table 5)
VAE_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
DECODE_BATCH_SIZE = 16


@dataclass(frozen=True)
class LatentScaling:
    """What the latents of a VAE are, and how the DiT sees them.

    channels        C of the latents
    stride          pixels a latent
    scale, shift    numbers, or lists of C of them: scaled = (latent - shift) scale
    image_channels  of the images
    """

    channels: int
    stride: int
    scale: object
    shift: object
    image_channels: int = 3

    def draw(self, moments, noise):
        """Scaled latents from the posterior N(mean, exp(log_var)).

        moments  (N, 2C, h, w) mean, then log_var
        noise    (N, C, h, w) standard normal
        return   (N, C, h, w) float32
        """
        mean, log_var = moments.float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_var) * noise
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def unscale(self, latents):
        """(N, C, h, w) as the DiT makes them -> as the VAE's decoder takes them."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)


def _per_channel(value, like):
    """A number as it is; one number a channel as a tensor (C, 1, 1)."""
    return value if isinstance(value, (int, float)) else _tensor(tuple(value), like.device)


@functools.cache
def _tensor(values, device):
    return torch.tensor(values, device=device)[:, None, None]


class IdentityAutoencoder:
    """No VAE: the DiT works on pixels in [-1, 1]."""

    name = "none"
    stride = 1
    is_random = False  # encoding draws no noise

    def __init__(self, channels):
        self.channels = channels

    def metadata(self):
        """What makes latents what they are; plain values."""
        return dict(vae="none")

    def encode(self, images, noise=None):
        """(N, C, H, W) images in [-1, 1] -> the same."""
        return images

    def decode(self, latents):
        """(N, C, H, W) -> the same; nothing confines them to [-1, 1]."""
        return latents


class VAE:
    """A frozen diffusers `AutoencoderKL`.

    name   what --vae said
    space  the `LatentScaling` of its latents
    """

    is_random = True  # encoding samples a posterior

    def __init__(self, name, vae):
        self.name, self.vae = name, vae.eval().requires_grad_(False)
        self.space = _latent_scaling(vae.config)
        self.channels, self.stride = self.space.channels, self.space.stride

    @property
    def encoder_sha256(self):
        """A name for all weights that latents depend on: VAEs that differ in the decoder alone share it."""
        return sha256_weights(*(part for part in (self.vae.encoder, self.vae.quant_conv) if part is not None))

    def metadata(self):
        """What makes latents what they are; plain values."""
        return dict(vae_sha256=self.encoder_sha256, **vars(self.space))

    @torch.no_grad()
    def moments(self, images):
        """(N, C, H, W) images in [-1, 1] -> (N, 2C, H / stride, W / stride): mean and log_var of the posterior."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def encode(self, images, noise):
        """Draw scaled latents from the posterior of images, with `noise` of the latents' shape."""
        return self.space.draw(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents):
        """(N, C, h, w) scaled latents -> (N, 3, h stride, w stride) images, about [-1, 1].

        In parts: at 512 pixels one activation of the decoder takes 0.3 GB an image.
        """
        parts = self.space.unscale(latents).split(DECODE_BATCH_SIZE)
        return torch.cat([self.vae.decode(part).sample for part in parts])


class CachedLatents:
    """The codec of a latent cache: encoding draws from moments that a VAE made earlier.

    name            of that VAE
    space           the `LatentScaling` of its latents
    encoder_sha256  of its weights
    vae             a `VAE` to decode with, or None: then nothing can be decoded
    """

    is_random = True

    def __init__(self, name, space, encoder_sha256, vae=None):
        self.name, self.space, self.encoder_sha256, self.vae = name, space, encoder_sha256, vae
        self.channels, self.stride = space.channels, space.stride

    def encode(self, moments, noise):
        """(N, 2C, h, w) moments of any floating type -> (N, C, h, w) scaled latents."""
        return self.space.draw(moments, noise)

    def decode(self, latents):
        return self.vae.decode(latents)

    def metadata(self):
        """What makes latents what they are; plain values."""
        return dict(vae_sha256=self.encoder_sha256, **vars(self.space))


def _latent_scaling(config):
    """The latents of an `AutoencoderKL`, from its configuration."""
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is not None and stds is not None:  # some normalise each channel, then scale
        means, stds = torch.tensor(means).flatten().tolist(), torch.tensor(stds).flatten().tolist()
        scale, shift = [scale / std for std in stds], [mean + shift for mean in means]
    return LatentScaling(channels=config.latent_channels, stride=2 ** (len(config.block_out_channels) - 1),
                       scale=scale, shift=shift, image_channels=config.in_channels)


def latent_size(autoencoder, image_size):
    """Latents a side for images of `image_size` pixels."""
    if image_size % autoencoder.stride:
        raise UserError(f"--image-size {image_size} is not a multiple of {autoencoder.stride}, "
                        f"the pixels a latent of --vae {autoencoder.name}")
    return image_size // autoencoder.stride


def load_autoencoder(name, channels=3, device="cpu"):
    """The codec that --vae names.

    name      "ema" or "mse" (the paper's), a directory that diffusers' save_pretrained wrote, another name on the
              Hugging Face hub, with a folder in it if need be ("OWNER/MODEL/vae"), or "none" for pixels
    channels  of the images; what "none" passes on
    """
    if name == "none":
        return IdentityAutoencoder(channels)
    from diffusers import AutoencoderKL
    source = VAE_NAMES.get(name, name)
    if not os.path.isdir(source) and (os.path.isabs(source) or "/" not in source):
        raise UserError(f"--vae '{name}' could not be loaded: there is no such folder. Others: {', '.join(VAE_NAMES)}, "
                        "OWNER/MODEL on the Hugging Face hub, none (pixels)")
    known = f"'{source}'" if source == name else f"'{name}' ({source})"
    local = os.path.isdir(source)
    repository, folder = (source, None) if local else _split_hub_name(source)
    try:
        vae = AutoencoderKL.from_pretrained(repository, subfolder=folder).to(device)
        autoencoder = VAE(name, vae)
    except Exception as error:  # what is no VAE fails in many ways; each means the same
        if local:
            advice = "the directory must hold config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL"
        else:
            advice = (f"without a network, fetch https://huggingface.co/{repository} elsewhere and pass its directory, "
                      "as in --vae /path/to/sd-vae-ft-ema")
        raise UserError(f"--vae {known} could not be loaded: {advice}. diffusers says: {_first_line(error)}") from None
    if vae.config.in_channels != channels:
        raise UserError(f"--vae {known} takes images of {vae.config.in_channels} channels, this data has {channels}; "
                        "--vae none works on the pixels themselves")
    return autoencoder


def _split_hub_name(name):
    """"OWNER/MODEL/FOLDER" -> "OWNER/MODEL", "FOLDER"; the folder is None where there is none."""
    owner, *rest = name.split("/", 2)
    return "/".join([owner, *rest[:1]]), rest[1] if len(rest) > 1 else None


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
