"""The built-in data set of colored fractals, drawn from formulas at any size and for any number of classes.

After Kataoka et al., "Pre-training without Natural Images" (2020, arXiv 2101.08515): a class is an iterated function
system, a few contracting affine maps, kept if its picture fills enough of the frame; an image of the class is drawn by
the chaos game with slightly changed parameters. Maps are drawn by their singular values, as Anderson & Farrell do
("Improving Fractal Pre-training", 2022, arXiv 2110.03091), so that most are kept.
"""
import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from common.resources import check_memory
from data.builtin import BUILTIN_DATASETS
from data.dataset import LabeledImageDataset
from data.path_list import PathList

IMAGE_INDICES = {"train": range(1000), "held-out": range(1000, 1100)}  # of each class
MAX_MAPS = 6
# Scaling the six numbers of a map by 1 +- 0.2 stretches it by less than 1 + 0.2 sqrt(2): all images' maps contract.
MAX_SINGULAR_VALUE, VARIATION = 0.77, 0.2
COVERAGE_RANGE = 0.25, 0.75  # share of the pixels of a 32 x 32 frame that the picture of a class covers
POINTS_PER_PIXEL = 8
BURN_IN_STEPS = 10  # steps after which a point may be anywhere in the picture
# One number for each use of random words, so that two uses never share a sequence.
SYSTEM, TRIAL, IMAGE = range(3)


class FractalsDataset(LabeledImageDataset):
    """Fractals: an image is a function of (class, index) alone, so class 17 is the same with 20 classes and with 1000.

    The split "train" has 1,000 images per class, "held-out" 100 others.
    """

    channels = 3
    flips = False  # the mirror image belongs to another system, which is not a class

    def __init__(self, image_size=BUILTIN_DATASETS["fractals"]["image_size"],
                 num_classes=BUILTIN_DATASETS["fractals"]["num_classes"], split="train"):
        self.image_size, self.indices = image_size, IMAGE_INDICES[split]
        self.class_names = [f"fractal {label:03d}" for label in range(num_classes)]
        self.labels = np.repeat(np.arange(num_classes), len(self.indices))
        self.paths = PathList(f"fractals/{label:03d}/{index}" for label in range(num_classes) for index in self.indices)

    def read(self, index):
        """Return image `index`, shape (3, image_size, image_size), float32 in [-1, 1]."""
        label, number = divmod(index, len(self.indices))
        return torch.from_numpy(draw(label, self.indices[number], self.image_size)).float() / 127.5 - 1


class IteratedFunctionSystem(NamedTuple):
    """A class: its maps and their colors."""

    maps: np.ndarray  # K affine maps of the plane, [[a, b, e], [c, d, f]], shape (2, 3, K)
    choices: np.ndarray  # the map that each value of a random byte applies, shape (256,)
    palette: np.ndarray  # color in [0, 1] of a point, by the last map and the one before it, shape (3, K * K)


def check_sizes(image_size, num_classes):
    """Raise an `ArgumentError` for more classes, or a larger image, than the memory can hold."""
    check_memory(num_classes * 1000 * 24, num_classes=num_classes)  # a label and a path for each image
    check_memory(image_size**2 * POINTS_PER_PIXEL * 24, image_size=image_size)  # coordinates and color of each point


def draw(label, index, size):
    """Draw image `index` of class `label` on black: shape (3, size, size), uint8."""
    system = get_system(label)
    chains = max(128, 16 * size)
    steps = -(-POINTS_PER_PIXEL * size * size // chains)
    words = random_words(6 + -(-chains * (BURN_IN_STEPS + steps) // 8), IMAGE, label, index)
    factors = 1 + VARIATION * (2 * uniform(words[:6]) - 1)
    varied = system._replace(maps=system.maps * factors.reshape(2, 3, 1))
    points, color_indices = chaos_game(varied, words[6:], chains, steps)
    pixels = to_pixel_indices(points, size)
    counts = np.bincount(pixels, minlength=size * size)
    light = np.stack([np.bincount(pixels, row.take(color_indices), minlength=size * size) for row in system.palette])
    # The mean color of a pixel's points, the darker the fewer they are. Except for sines and cosines, the arithmetic
    # is rounded the same on every processor and summed in a fixed order.
    mean_count = counts.sum() / np.count_nonzero(counts)
    image = 1.25 * light / (counts + 0.25 * mean_count)
    return np.minimum(255 * image + 0.5, 255).astype(np.uint8).reshape(3, size, size)


@functools.cache
def get_system(label):
    """Return the `IteratedFunctionSystem` of a class: the first random one with enough coverage."""
    for attempt in itertools.count():
        if has_good_coverage(system := random_system(label, attempt), label, attempt):
            return system


def random_system(label, attempt):
    """Draw two to six maps, each a rotation, a scaling of both axes, another rotation and a shift; and their colors."""
    numbers = uniform(random_words(3 + 10 * MAX_MAPS, SYSTEM, label, attempt))
    count = 2 + int((MAX_MAPS - 1) * numbers[0])
    turn, turn_before, major, minor, mirror, right, down, hue, gray, dark = numbers[3:].reshape(10, -1)[:, :count]
    major = 0.35 + (MAX_SINGULAR_VALUE - 0.35) * major
    minor = major * (0.25 + 0.75 * minor)
    scale = np.stack([major, np.where(mirror < 0.5, minor, -minor)])
    before, after = rotations(turn_before), rotations(turn) * scale
    linear = after[:, :1] * before[0] + after[:, 1:] * before[1]  # (2, 2, K) matrix products
    shift = 2 * np.stack([right, down]) - 1
    # A map is chosen in proportion to its area (Barnsley), but never too rarely; in 256ths.
    weight = major * minor + 0.02
    choices = np.searchsorted(np.rint(256 * np.cumsum(weight) / weight.sum()), np.arange(256), side="right")
    hues = numbers[1] + (0.15 + 0.5 * numbers[2]) * (hue - 0.5)  # around one hue of the class
    colors = rgb(hues, 0.95 - 0.6 * gray, 1 - 0.45 * dark)
    palette = (2 * colors[:, :, None] + colors[:, None, :]) / 3
    return IteratedFunctionSystem(np.concatenate([linear, shift[:, None]], axis=1), choices, palette.reshape(3, -1))


def rotations(turns):
    """Return rotation matrices, shape (2, 2, K), of K fractions of a full turn."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    return np.array([[cos, -sin], [sin, cos]])


def rgb(hue, saturation, value):
    """Convert K colors from HSV to RGB, shape (3, K), in [0, 1]; the hue is taken modulo 1."""
    sector = (np.array([5, 3, 1])[:, None] + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)


def has_good_coverage(system, label, attempt, size=32, chains=128, steps=16):
    """Return whether a system covers `COVERAGE_RANGE` of a frame; tried at one size, so that classes do not vary."""
    words = random_words(chains * (BURN_IN_STEPS + steps) // 8, TRIAL, label, attempt)
    points, _ = chaos_game(system, words, chains, steps)
    coverage = len(np.unique(to_pixel_indices(points, size))) / size**2
    return COVERAGE_RANGE[0] <= coverage <= COVERAGE_RANGE[1]


def chaos_game(system, words, chains, steps):
    """Move `chains` points at once by random maps, `steps` times after the burn-in.

    Takes chains * (BURN_IN_STEPS + steps) / 8 random 64-bit words. Returns points of the fractal, shape
    (2, chains * steps), and the palette index of each.
    """
    maps, count = system.maps, system.maps.shape[2]
    random_bytes = words.astype("<u8").view(np.uint8)[:chains * (BURN_IN_STEPS + steps)]
    choices = system.choices[random_bytes].reshape(-1, chains)
    path = np.empty((BURN_IN_STEPS + steps, 2, chains))
    point = fixed_point(maps[..., 0])[:, None]  # it belongs to the fractal, and so do all points that follow
    for chosen, out in zip(choices, path):
        applied = maps.take(chosen, axis=2)  # (2, 3, chains)
        applied[:, :2] *= point
        point = applied.sum(axis=1, out=out)
    color_indices = choices[BURN_IN_STEPS:] * count + choices[BURN_IN_STEPS - 1:-1]
    return path[BURN_IN_STEPS:].swapaxes(0, 1).reshape(2, -1), color_indices.ravel()


def fixed_point(affine):
    """Return the point, shape (2,), that a map [[a, b, e], [c, d, f]] leaves where it is."""
    (a, b, e), (c, d, f) = affine
    return np.array([(1 - d) * e + b * f, (1 - a) * f + c * e]) / ((1 - a) * (1 - d) - b * c)


def to_pixel_indices(points, size):
    """Convert points, shape (2, N), to row-major pixel indices, shape (N,), of a frame that they just fill."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    column, row = np.minimum((points - low) * (size / (high - low)), size - 1).astype(np.intp)
    return row * size + column


def random_words(count, use, label, index):
    """Return random 64-bit words of (use, label, index): raw ones of Philox (Salmon et al., 2011), stable in numpy."""
    return np.random.Philox(key=use, counter=(label << 128) + (index << 64)).random_raw(count)


def uniform(words):
    """Convert 64-bit words to numbers in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53
