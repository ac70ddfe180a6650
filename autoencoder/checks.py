"""Checks at the start of a run: is this the right autoencoder, and is its scale right?"""
import math

import torch

from autoencoder.vae import VAE
from common.errors import ArgumentError

NUM_CHECK_IMAGES = 8


def check_autoencoder(autoencoder, examples, device):
    """Yield lines about a few images, or moments, and their latents: a wrong scale would cost a full training run.

    `examples` has the shape (N, ...), or is None if there are none; `device` is that of the autoencoder.
    """
    if examples is None or not autoencoder.is_random:
        return
    examples = examples.to(device)
    if isinstance(autoencoder, VAE):
        yield from check_round_trip(autoencoder, examples)
    else:
        yield from check_latent_statistics(autoencoder, autoencoder.encode(examples, 0.0))


def check_round_trip(autoencoder, images):
    """Encode and decode images in [-1, 1], shape (N, C, H, W), and describe the error and the latents.

    Stable Diffusion's VAE restores photographs to about 25 dB.
    """
    # One image at a time, so that this needs less memory than what follows.
    latents = torch.cat([autoencoder.encode(image, 0.0) for image in images.split(1)])
    _check_finite(autoencoder, latents, "latents")
    decoded = torch.cat([autoencoder.decode(latent) for latent in latents.split(1)]).float()
    _check_finite(autoencoder, decoded, "decoded images")
    mse = torch.nn.functional.mse_loss(decoded, images).item()
    psnr = 10 * math.log10(4 / max(mse, 1e-12))  # 4: the square of the range
    contrast = (decoded.std() / images.std().clamp(min=0.05)).item()
    brightness = (decoded.mean() - images.mean()).item()
    yield (f"Round trip of {len(images)} images through the VAE {autoencoder.name}: PSNR {psnr:.1f} dB, "
           f"pixels {decoded.min():.2f} .. {decoded.max():.2f} (they were {images.min():.2f} .. {images.max():.2f})")
    if psnr < 15 or not 0.8 < contrast < 1.25 or abs(brightness) > 0.25:
        yield (f"WARNING: the VAE {autoencoder.name} does not restore these images: PSNR {psnr:.1f} dB (25 is usual), "
               f"{contrast:.2f} times the contrast, brighter by {brightness:+.2f}. Was it trained on images of another "
               "kind, or in another range than [-1, 1]?")
    yield from check_latent_statistics(autoencoder, latents)


def check_latent_statistics(autoencoder, latents):
    """Describe scaled latents, shape (N, C, h, w): their mean should be about 0, their standard deviation about 1.

    The forward process ends in standard normal noise, and its schedule is made for data of that size.
    """
    _check_finite(autoencoder, latents, "latents")
    name, scaling = autoencoder.name, autoencoder.latent_scaling
    mean, std = latents.mean().item(), latents.std().item()
    yield f"Latents of the VAE {name}: {tuple(latents.shape[1:])} each, mean {mean:.3f}, std {std:.3f} as scaled"
    if not 0.5 < std < 2:
        yield (f"WARNING: the latents of the VAE {name} have a standard deviation of {std:.3g}, about 1 is expected: "
               f"is the scaling_factor {_format(scaling.scale)} in its config.json right?")
    if abs(mean) > max(std, 0.5):
        yield (f"WARNING: the latents of the VAE {name} have a mean of {mean:.3g}, about 0 is expected: is the "
               f"shift_factor {_format(scaling.shift)} in its config.json right?")


def _check_finite(autoencoder, tensor, what):
    if not torch.isfinite(tensor).all():
        raise ArgumentError(f"its {what} are non-finite. Are its weights damaged, or its numbers too large for the "
                            "precision?", vae=autoencoder.name)


def _format(value):
    return f"{value:g}" if isinstance(value, (int, float)) else f"{value[0]:g}, ..."
