"""How large the studies are: data, networks, training length, number of samples."""
from dataclasses import dataclass, field, replace

import models


@dataclass(frozen=True)
class Preset:
    """How large the studies are; by default, for two CPU cores. All networks are trained alike, as the paper's are."""

    name: str = "miniature"
    data: str = "digits"  # value of --data-path
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    num_workers: int = 0  # processes that load images
    features: str = "pixels"  # as evaluate.py takes them; "classifier": those of one that the studies train first
    sizes: dict = field(default_factory=lambda: {  # {name: (depth, hidden size, heads)}, the smallest first
        "2x32": (2, 32, 2), "3x48": (3, 48, 3), "4x64": (4, 64, 4), "5x80": (5, 80, 5)})
    patches: tuple = (4, 2, 1)  # the largest first; `scaling` trains all sizes x patches
    network: tuple = ("4x64", 2)  # (size, patch) of the studies of a single network
    seeds: tuple = (0, 1, 2)
    grid_seeds: tuple = (0,)  # seeds of `scaling` and `sampling_steps`
    steps: int = 1500
    batch_size: int = 64
    lr: float = 2e-3
    ema_decay: float = 0.995
    curve_every: int = 300  # steps between two points of the distance over training
    curve_samples: int = 400
    curve_sampling: str = "ddim25"
    samples: int = 1000  # samples of a trained network
    sampling: str = "ddim50"  # as --num-sampling-steps takes it
    sample_batch: int = 250
    step_counts: tuple = (16, 32, 64, 128, 256, 1000)  # sampling steps of figure 10, with its patches and samples
    step_patches: tuple = (4, 2)
    step_samples: int = 500
    guidance_scales: tuple = (1, 1.25, 1.5, 2, 3, 4, 6)
    interval_scales: tuple = (2, 4)  # guidance scales in each of the intervals of timesteps (low, high)
    intervals: tuple = ((667, 999), (334, 666), (0, 333))
    decays: tuple = (0, 0.9, 0.98, 0.995, 0.999, 0.9997)  # of the EMA; 0: the weights themselves
    snapshots: tuple = (0.25, 1)  # shares of the training, multiples of the first one
    variance_steps: tuple = (5, 10, 25, 50, 250)
    solver_calls: tuple = (5, 10, 20, 50)  # calls of the model by `solvers`, and of DDPM and DDIM in addition:
    reference_calls: int = 250
    fast: bool = False  # --fast

    @property
    def snapshot_steps(self):
        """Steps after which `ema_decay` samples, in order."""
        return sorted({max(1, round(share * self.steps)) for share in self.snapshots})


# With 32 x 32 pixels these patches make the paper's 16, 64 and 256 tokens.
FRACTALS = Preset(
    data="fractals", image_size=32, channels=3, num_classes=100, num_workers=8, features="classifier",
    patches=(8, 4, 2), step_patches=(8, 4), steps=10_000, batch_size=128, lr=1e-3, ema_decay=0.999, curve_every=2500,
    curve_samples=2000, samples=5000, step_samples=2000, sample_batch=500, fast=True)
PRESETS = {(preset.data, preset.name): preset for preset in (
    Preset(),
    Preset(  # for tests: every study in seconds
        name="toy", sizes={"1x16": (1, 16, 2), "2x16": (2, 16, 2)}, patches=(4,), network=("1x16", 4), seeds=(0, 1),
        steps=4, lr=0.02, batch_size=8, curve_every=2, curve_samples=8, curve_sampling="ddim2", samples=12,
        sampling="ddim2", sample_batch=8, step_counts=(2, 3), step_patches=(4,), step_samples=6,
        guidance_scales=(1, 2), interval_scales=(2,), intervals=((500, 999),), decays=(0, 0.5, 0.9),
        variance_steps=(2, 3), solver_calls=(2, 4), reference_calls=5),
    FRACTALS,
    replace(FRACTALS, name="paper", sizes={name: models.SIZES[name] for name in ("S", "B", "L", "XL")},
            network=("XL", 2), steps=20_000, batch_size=256, lr=1e-4, ema_decay=0.9995, step_patches=(8, 4, 2),
            decays=(0, 0.99, 0.999, 0.9995, 0.9999)))}
