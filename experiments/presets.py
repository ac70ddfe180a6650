"""How large the studies are: the data, the networks, how long each is trained, how many samples judge it."""

from dataclasses import dataclass, replace

import models


@dataclass(frozen=True)
class StudyData:
    """A data set that train.py knows, and what samples of it are judged by.

    name         as --data-path takes it
    num_workers  processes that load images
    features     the space of distances, as evaluate.py's --features; "classifier": one that the studies train first
    """
    name: str
    image_size: int
    channels: int
    num_classes: int
    num_workers: int
    features: str

    @property
    def held_out(self):
        """The images that samples are compared with, as evaluate.py names them."""
        return f"{self.name}-held-out"

    @property
    def data_flags(self):
        return "--data-path", self.name, "--image-size", self.image_size, "--num-classes", self.num_classes

    @property
    def flags(self):
        """Of train.py."""
        return *self.data_flags, "--vae", "none", "--num-workers", self.num_workers


DIGITS = StudyData("digits", 8, 1, 10, 0, "pixels")
FRACTALS = StudyData("fractals", 32, 3, 100, 8, "classifier")
STUDY_DATA = {images.name: images for images in (DIGITS, FRACTALS)}


@dataclass(frozen=True)
class StudyPreset:
    """How large the studies are. All networks of a scale are trained alike, as the paper's are.

    sizes            {name: (depth, width, heads)}, the smallest first
    patches          the largest first; the grid of `scaling` is sizes x patches
    one              (size, patch): the network of the studies of a single one
    seeds            of the trainings of that one; grid_seeds: of the grid's
    steps            optimiser steps
    curve_*          the distance over the training's steps: how often, of how many samples, sampled how
    samples          that judge a trained network; sampled with `sampling`, as --num-sampling-steps says it
    step_*           figure 10: numbers of sampling steps, patches of the networks, samples
    guidance_scales  1 is none; interval_scales: with guidance in one of `intervals` of timesteps (low, high) alone
    decays           of the moving average; 0: the weights themselves. snapshots: shares of the training
    variance_steps   numbers of sampling steps
    fast             --fast
    """
    name: str
    sizes: dict
    patches: tuple
    one: tuple
    seeds: tuple = (0, 1, 2)
    grid_seeds: tuple = (0,)
    steps: int = 1500
    batch_size: int = 64
    lr: float = 2e-3
    ema_decay: float = 0.995
    curve_every: int = 300
    curve_samples: int = 400
    curve_sampling: str = "ddim25"
    samples: int = 1000
    sampling: str = "ddim50"
    sample_batch: int = 250
    step_counts: tuple = (16, 32, 64, 128, 256, 1000)
    step_patches: tuple = (4, 2)
    step_samples: int = 500
    guidance_scales: tuple = (1, 1.25, 1.5, 2, 3, 4, 6)
    interval_scales: tuple = (2, 4)
    intervals: tuple = ((667, 999), (334, 666), (0, 333))
    decays: tuple = (0, 0.9, 0.98, 0.995, 0.999, 0.9997)
    snapshots: tuple = (0.25, 1)
    variance_steps: tuple = (5, 10, 25, 50, 250)
    fast: bool = False


MINIATURE = StudyPreset("miniature", {"2x32": (2, 32, 2), "3x48": (3, 48, 3), "4x64": (4, 64, 4), "5x80": (5, 80, 5)},
                  patches=(4, 2, 1), one=("4x64", 2))
PRESETS = {
    ("digits", "miniature"): MINIATURE,
    # for tests: every study in seconds
    ("digits", "toy"): replace(
        MINIATURE, name="toy", sizes={"1x16": (1, 16, 2), "2x16": (2, 16, 2)}, patches=(4,), one=("1x16", 4),
        seeds=(0, 1), grid_seeds=(0,), steps=4, lr=0.02, batch_size=8, curve_every=2, curve_samples=8,
        curve_sampling="ddim2", samples=12, sampling="ddim2", sample_batch=8, step_counts=(2, 3), step_patches=(4,),
        step_samples=6, guidance_scales=(1, 2), interval_scales=(2,), intervals=((500, 999),), decays=(0, 0.5, 0.9),
        variance_steps=(2, 3)),
    # 32 x 32 pixels: with these patches the paper's 16, 64 and 256 tokens
    ("fractals", "miniature"): replace(
        MINIATURE, patches=(8, 4, 2), step_patches=(8, 4), steps=10_000, batch_size=128, lr=1e-3, ema_decay=0.999,
        curve_every=2500, curve_samples=2000, samples=5000, step_samples=2000, sample_batch=500, fast=True),
    ("fractals", "paper"): replace(
        MINIATURE, name="paper", sizes={name: models.SIZES[name] for name in ("S", "B", "L", "XL")}, patches=(8, 4, 2),
        one=("XL", 2), grid_seeds=(0,), steps=20_000, batch_size=256, lr=1e-4, ema_decay=0.9995, curve_every=2500,
        curve_samples=2000, samples=5000, sample_batch=500, step_patches=(8, 4, 2), step_samples=2000,
        decays=(0, 0.99, 0.999, 0.9995, 0.9999), fast=True),
}
