"""The other embedded data set: coloured fractals drawn from formulas, of any size and any number of classes.

After Kataoka et al., "Pre-training without Natural Images" (2020, arXiv 2101.08515): a class is an iterated function
system, a few affine maps that contract, kept if its picture fills enough of the frame; an image of the class is drawn
with parameters a little off, by the chaos game. Maps are drawn by their singular values, as Anderson & Farrell do
("Improving Fractal Pre-training", 2022, arXiv 2110.03091), so that most are kept.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from data.builtin import BUILTIN_DATASETS
from data.dataset import LabeledImageDataset

IMAGES = {"train": range(1000), "held-out": range(1000, 1100)}  # indices of a class' images
MOST_MAPS = 6
# Scaling the six numbers of a map by 1 +- 0.2 lengthens it by less than 1 + 0.2 sqrt(2): every image's maps contract.
LARGEST, VARIATION = 0.77, 0.2
FILLED = 0.25, 0.75  # share of the pixels of 32 x 32 that a class' picture covers
POINTS = 8  # a pixel
FORGET = 10  # steps until a point may be anywhere in the picture
# One number for each use, so that two uses never share a sequence.
SYSTEM, TRIAL, IMAGE = range(3)


class FractalsDataset(LabeledImageDataset):
    """Fractals: every image is a function of (class, index) alone, whatever the process, the order and the epoch.

    split  "train": 1,000 images a class; "held-out": 100 others
    """

    channels = 3
    flips = False  # a mirrored fractal belongs to another system, which is of no class

    def __init__(self, image_size=BUILTIN_DATASETS["fractals"]["image_size"],
                 num_classes=BUILTIN_DATASETS["fractals"]["num_classes"], split="train"):
        self.image_size, self.split = image_size, split
        self.class_names = [f"fractal {label:03d}" for label in range(num_classes)]
        self.labels = [label for label in range(num_classes) for _ in IMAGES[split]]
        self.paths = [f"fractals/{label:03d}/{index}" for label in range(num_classes) for index in IMAGES[split]]

    def read(self, index):
        images = IMAGES[self.split]
        picture = draw(self.labels[index], images[index % len(images)], self.image_size)
        return torch.from_numpy(picture).float() / 127.5 - 1


class System(NamedTuple):
    """An iterated function system.

    maps     (2, 3, K) affine maps of the plane: [[a, b, e], [c, d, f]]
    choices  (256,) which map each value of a random byte applies
    palette  (3, K * K) the colour in 0 .. 1 of a point that went through one map last and through another before
    """
    maps: np.ndarray
    choices: np.ndarray
    palette: np.ndarray


def draw(label, index, size):
    """Image `index` of class `label`: (3, size, size) uint8, on black."""
    system = get_system(label)
    chains = max(128, 16 * size)
    steps = -(-POINTS * size * size // chains)
    words = random_words(6 + -(-chains * (FORGET + steps) // 8), IMAGE, label, index)
    factors = 1 + VARIATION * (2 * uniform(words[:6]) - 1)
    points, colours = chaos_game(system._replace(maps=system.maps * factors.reshape(2, 3, 1)), words[6:], chains, steps)
    pixels = to_pixel_indices(points, size)
    counts = np.bincount(pixels, minlength=size * size)
    light = np.stack([np.bincount(pixels, row.take(colours), minlength=size * size) for row in system.palette])
    # The mean colour of a pixel's points, the darker the fewer they are. But for sines and cosines, all of this is
    # arithmetic that is rounded alike everywhere and summed in a fixed order: processors draw the same image.
    usual = counts.sum() / np.count_nonzero(counts)
    image = 1.25 * light / (counts + 0.25 * usual)
    return np.minimum(255 * image + 0.5, 255).astype(np.uint8).reshape(3, size, size)


@functools.cache
def get_system(label):
    """The `System` of a class: the first that is good."""
    attempt = 0
    while not is_good(system := random_system(label, attempt), label, attempt):
        attempt += 1
    return system


def random_system(label, attempt):
    """Two to six maps, each a rotation, a scaling of both axes, another rotation and a shift; and their colours."""
    numbers = uniform(random_words(3 + 10 * MOST_MAPS, SYSTEM, label, attempt))
    count = 2 + int((MOST_MAPS - 1) * numbers[0])
    turn, turn_before, long, short, mirror, right, down, hue, grey, dark = numbers[3:].reshape(10, -1)[:, :count]
    long = 0.35 + (LARGEST - 0.35) * long
    short = long * (0.25 + 0.75 * short)
    scale = np.stack([long, np.where(mirror < 0.5, short, -short)])
    before, after = rotations(turn_before), rotations(turn) * scale
    linear = after[:, :1] * before[0] + after[:, 1:] * before[1]  # (2, 2, K) matrix products
    shift = 2 * np.stack([right, down]) - 1
    # As often as the map is large (Barnsley), but never hardly at all; in 256ths.
    weight = long * short + 0.02
    choices = np.searchsorted(np.rint(256 * np.cumsum(weight) / weight.sum()), np.arange(256), side="right")
    hues = numbers[1] + (0.15 + 0.5 * numbers[2]) * (hue - 0.5)  # about one hue of the class
    colours = rgb(hues, 0.95 - 0.6 * grey, 1 - 0.45 * dark)
    palette = (2 * colours[:, :, None] + colours[:, None, :]) / 3
    return System(np.concatenate([linear, shift[:, None]], axis=1), choices, palette.reshape(3, -1))


def rotations(turns):
    """(K,) parts of a full turn -> (2, 2, K)"""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    return np.array([[cos, -sin], [sin, cos]])


def rgb(hue, saturation, value):
    """HSV -> RGB, (3, K) in 0 .. 1; whole turns of the hue do not matter."""
    sector = (np.array([5, 3, 1])[:, None] + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)


def is_good(system, label, attempt, size=32, chains=128, steps=16):
    """Does it cover neither too little of a picture nor too much? Tried at one size: its class is the same at all."""
    points, _ = chaos_game(system, random_words(chains * (FORGET + steps) // 8, TRIAL, label, attempt), chains, steps)
    filled = len(np.unique(to_pixel_indices(points, size))) / size**2
    return FILLED[0] <= filled <= FILLED[1]


def chaos_game(system, words, chains, steps):
    """Apply random maps, one after the other, to many points at once.

    words   at least chains * (FORGET + steps) / 8 random ones
    return  (2, chains * steps) points of the fractal, and for each its column of the palette
    """
    maps, count = system.maps, system.maps.shape[2]
    choices = system.choices[words.astype("<u8").view(np.uint8)[:chains * (FORGET + steps)]].reshape(-1, chains)
    path = np.empty((FORGET + steps, 2, chains))
    point = fixed_point(maps[..., 0])[:, None]  # it belongs to the fractal, so that all points do
    for chosen, place in zip(choices, path):
        applied = maps.take(chosen, axis=2)  # (2, 3, chains)
        applied[:, :2] *= point
        point = applied.sum(axis=1, out=place)
    colours = choices[FORGET:] * count + choices[FORGET - 1:-1]
    return path[FORGET:].swapaxes(0, 1).reshape(2, -1), colours.ravel()


def fixed_point(affine):
    """The point (2,) that a map [[a, b, e], [c, d, f]] leaves where it is."""
    (a, b, e), (c, d, f) = affine
    return np.array([(1 - d) * e + b * f, (1 - a) * f + c * e]) / ((1 - a) * (1 - d) - b * c)


def to_pixel_indices(points, size):
    """(2, N) points -> (N,) pixels, counted row by row, of a frame that the points just fill."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    column, row = np.minimum((points - low) * (size / (high - low)), size - 1).astype(np.intp)
    return row * size + column


def random_words(count, use, label, index):
    """(count,) random 64-bit words, a function of (use, label, index).

    Philox (Salmon et al., 2011) as it comes: numpy promises its words for ever, but not what a `Generator` makes of it.
    """
    return np.random.Philox(key=use, counter=(label << 128) + (index << 64)).random_raw(count)


def uniform(words):
    """64-bit words -> numbers in [0, 1)"""
    return (words >> np.uint64(11)) * 2.0**-53
