"""Between pixels and what the DiT sees. The one place that knows a VAE's scale, shift, channels and stride."""
import os

import torch

from .errors import UserError

# The VAEs of the paper: Stable Diffusion's, its decoder fine-tuned (table 5)
VAE_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

DECODED_AT_ONCE = 16


class PixelCodec:
    """No VAE: the DiT works on pixels in [-1, 1]."""

    name = "none"
    stride = 1
    is_random = False  # encoding draws no noise

    def __init__(self, channels):
        self.channels = channels

    def encode(self, images, noise=None):
        """(N, C, H, W) images in [-1, 1] -> the same."""
        return images

    def decode(self, latents):
        """(N, C, H, W) -> the same; nothing confines them to [-1, 1]."""
        return latents


class VAECodec:
    """A frozen diffusers `AutoencoderKL`.

    name      what --vae said
    channels  C of the latents
    stride    pixels a latent
    """

    is_random = True  # encoding samples a posterior

    def __init__(self, name, vae):
        self.name, self.vae = name, vae.eval().requires_grad_(False)
        self.channels = vae.config.latent_channels
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scale = vae.config.scaling_factor
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode(self, images, noise):
        """Draw scaled latents from the VAE's posterior.

        images  (N, 3, H, W) in [-1, 1]
        noise   (N, C, H / stride, W / stride) standard normal
        return  (mean + std noise - shift) scale, of noise's shape
        """
        posterior = self.vae.encode(images).latent_dist
        return (posterior.mean + posterior.std * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """(N, C, h, w) scaled latents -> (N, 3, h stride, w stride) images, about [-1, 1].

        In parts: at 512 pixels one activation of the decoder takes 0.3 GB an image.
        """
        parts = (latents / self.scale + self.shift).split(DECODED_AT_ONCE)
        return torch.cat([self.vae.decode(part).sample for part in parts])


def latent_size(codec, image_size):
    """Latents a side for images of `image_size` pixels."""
    if image_size % codec.stride:
        raise UserError(f"--image-size {image_size} is not a multiple of {codec.stride}, "
                        f"the pixels a latent of --vae {codec.name}")
    return image_size // codec.stride


def open_codec(name, channels=3, device="cpu"):
    """The codec that --vae names.

    name      "ema" or "mse" (the paper's), a directory that diffusers' save_pretrained wrote, another name on the
              Hugging Face hub, or "none" for pixels
    channels  of the images; what "none" passes on
    """
    if name == "none":
        return PixelCodec(channels)
    from diffusers import AutoencoderKL
    source = VAE_NAMES.get(name, name)
    known = f"'{source}'" if source == name else f"'{name}' ({source})"
    try:
        vae = AutoencoderKL.from_pretrained(source).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        if os.path.isdir(source) or os.path.isabs(source):
            advice = "the directory must hold config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL"
        else:
            advice = (f"without a network, fetch https://huggingface.co/{source} elsewhere and pass its directory, "
                      "as in --vae /path/to/sd-vae-ft-ema; --vae none works on pixels")
        raise UserError(f"--vae {known} could not be loaded: {advice}. diffusers says: {_first_line(error)}") from None
    if vae.config.in_channels != channels:
        raise UserError(f"--vae {known} takes images of {vae.config.in_channels} channels, this data has {channels}; "
                        "--vae none works on the pixels themselves")
    return VAECodec(name, vae)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
