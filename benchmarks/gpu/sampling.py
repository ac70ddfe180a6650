"""Rows of sampling: guided loops, intervals, and the decoder of the VAE."""
import torch

from autoencoder.vae import IdentityAutoencoder
from benchmarks.gpu.row import NotOnThisDevice
from benchmarks.gpu.training import FAST, choose_compute, matmul_precision, randomize
from benchmarks.sample import published_loop
from benchmarks.timing import summarize_times, time_alone
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline


def build_sampler(scale, model="DiT-XL/2", batch=32, steps="250", base=FAST, cfg_interval=None, **changes):
    """Return a function that samples a batch of latents with guidance 4, (on_step) -> latents, and its pipeline."""
    batch = scale.batch(batch)
    network = randomize(scale.network(model).eval())
    pipeline = build_pipeline(network, IdentityAutoencoder(4), steps, 4.0, cfg_interval=cfg_interval,
                              compute=choose_compute(scale, "plain" if base == "published" else base, changes))
    cond = dict(y=torch.arange(batch, device=scale.device))

    def sample(on_step=None):
        noise = PerSampleRNG(0, range(batch), scale.device)
        if base == "published":
            with torch.no_grad():
                return published_loop(pipeline, cond, noise)
        return pipeline(cond, noise, on_step)

    return sample, pipeline


def measure_sampling(scale, batch=32, steps="250", measured_steps=None, **options):
    """Return seconds a batch, images a second and seconds a step.

    Args:
        scale (Scale): Device and size.
        batch (int): Images at once.
        steps (str): As --num-sampling-steps.
        measured_steps (str): If all steps cost the same: a smaller number of steps to measure; seconds are scaled.
        **options: As of `build_sampler`.
    """
    if scale.is_tiny:
        steps, measured_steps = "ddim4" if str(steps).startswith("ddim") else "3", None
    sample, pipeline = None, None

    def build():
        nonlocal sample, pipeline
        sample, pipeline = build_sampler(scale, batch=batch, steps=measured_steps or steps, **options)
        return sample

    with matmul_precision(scale, "tf32"):
        row = time_alone(build, 1, scale.count(3), 1)
    count = pipeline.diffusion.num_timesteps
    factor = int(str(steps).removeprefix("ddim")) / count if measured_steps else 1
    row |= {name: value * factor for name, value in summarize_times(row.pop("times")).items()}
    row |= dict(batch=scale.batch(batch), measured_steps=count)
    row["images_per_second"] = row["batch"] / row["seconds"]
    row["milliseconds_per_step"] = 1e3 * row["seconds"] / (count * factor)
    return row


def measure_decoder(scale, batch=32, size=32):
    """Return images a second of the decoder of Stable Diffusion's VAE, with random weights, in float32 (TF32)."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise NotOnThisDevice("diffusers is not installed; see benchmarks/gpu-wheels.txt") from None
    widths = (8, 16) if scale.is_tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=8 if scale.is_tiny else 32)
    vae, batch = vae.to(scale.device).eval().requires_grad_(False), scale.batch(batch)
    latents = torch.randn(batch, 4, 8 if scale.is_tiny else size, 8 if scale.is_tiny else size, device=scale.device)
    with torch.no_grad(), matmul_precision(scale, "tf32"):
        row = time_alone(lambda: lambda: vae.decode(latents).sample, 2, 3, scale.count(3))
    row |= summarize_times(row.pop("times")) | dict(batch=batch)
    return row | dict(images_per_second=batch / row["seconds"])
