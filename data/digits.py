"""The built-in data set of handwritten digits, which scikit-learn holds."""
import numpy as np
import torch
from sklearn.datasets import load_digits

from data.dataset import LabeledImageDataset


class DigitsDataset(LabeledImageDataset):
    """1,797 grayscale images of 8x8 pixels in ten classes; every fifth one is in the split "held-out"."""

    channels = 1
    flips = False  # a mirrored 2 is not a 2
    image_size = 8

    def __init__(self, split="train"):
        digits = load_digits()
        is_held_out = np.arange(len(digits.target)) % 5 == 4
        is_chosen = is_held_out if split == "held-out" else ~is_held_out
        self.images = torch.tensor(digits.images[is_chosen] / 8.0 - 1.0, dtype=torch.float32)[:, None]
        self.labels = digits.target[is_chosen].astype(np.int64)
        self.class_names = [str(name) for name in digits.target_names]
        self.paths = [f"load_digits/{index}" for index in np.flatnonzero(is_chosen)]

    def read(self, index):
        """Return image `index`, shape (1, 8, 8)."""
        return self.images[index]
