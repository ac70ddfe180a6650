"""Animations of the path from noise to image."""
import torch

from common.errors import UserError
from data.image_io import make_image_grid, to_pil


class TrajectoryRecorder:
    """An `on_step` of `SamplingPipeline` that keeps x_t of about `frames` evenly spaced steps for an animation."""

    def __init__(self, num_steps, frames=50):
        self.steps = {round(i) - 1 for i in torch.linspace(0, num_steps, min(frames, num_steps) + 1).tolist()}
        self.latents = []

    def __call__(self, step, x):
        """Keep x_t if this is one of the steps to show."""
        if step in self.steps:
            self.latents.append(x)

    def save(self, autoencoder, columns, path, milliseconds=60):
        """Decode the latents and write a looping GIF, with a pause on the last frame."""
        images = [autoencoder.decode(x) for x in self.latents]
        if not all(torch.isfinite(image).all() for image in images):
            raise UserError(f"cannot write the animation {path}: images between noise and result are not finite")
        frames = [to_pil(make_image_grid(image, columns)) for image in images]
        try:
            frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                           duration=[milliseconds] * (len(frames) - 1) + [2000])
        except OSError as error:
            raise UserError(f"cannot write the animation {path}: {error}") from None
