"""The embedded data set: scikit-learn's handwritten digits, and a classifier that judges samples of them."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from data.dataset import LabeledImageDataset


class DigitsDataset(LabeledImageDataset):
    """1,797 real 8x8 grey images in ten classes, part of the package.

    split  "train": four of five images, in the package's order; "held-out": every fifth
    """

    channels = 1
    flips = False  # a mirrored 2 is no 2
    image_size = 8

    def __init__(self, split="train"):
        digits = load_digits()
        held_out = np.arange(len(digits.target)) % 5 == 4
        chosen = held_out if split == "held-out" else ~held_out
        self.images = torch.tensor(digits.images[chosen] / 8.0 - 1.0, dtype=torch.float32)[:, None]
        self.labels = digits.target[chosen].tolist()
        self.class_names = [str(name) for name in digits.target_names]
        self.paths = [f"load_digits/{index}" for index in np.flatnonzero(chosen)]

    def read(self, index):
        return self.images[index]
