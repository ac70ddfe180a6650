"""The interface of a data set: labeled images, read in batches."""
import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from data.class_names import describe_classes
from data.corrupt_images import CorruptImage


class Batch(NamedTuple):
    """What a data set returns for a list of (index, flip).

    Attributes:
        images (Tensor): Images in [-1, 1], shape (n, C, H, W), or what the autoencoder encodes; None if too many are
            corrupt.
        cond (dict[str, Tensor]): Keyword arguments of the model: {"y": class labels}, shape (n,), int64.
        corrupt (list[CorruptImage]): The corrupt images that were replaced.
    """

    images: torch.Tensor | None
    cond: dict[str, torch.Tensor] | None
    corrupt: list[CorruptImage]


class LabeledImageDataset(Dataset):
    """Images with class labels, read in batches of (index, flip).

    A corrupt image is replaced by another one (`substitute_index`): the images that a run sees stay a function of the
    data and the seed. A subclass sets the attributes and defines `read`.

    Attributes:
        channels (int): C of the images.
        flips (bool): Whether a mirror image belongs to the same class.
        class_names (list[str]): Names of the classes, by label.
        labels (ndarray): Class label of each image, shape (N,), int64.
        paths (Sequence[str]): Path or name of each image.
        max_bad_images (int): Number of corrupt images in a batch above which it cannot be read.
        on_device (bool): Whether batches are on the device already, so that worker processes are of no use.
    """

    on_device = False
    max_bad_images = 0

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        """Return image `index`, shape (C, H, W), float32 in [-1, 1], or a `CorruptImage`."""
        raise NotImplementedError

    def __getitems__(self, keys):
        images, labels, corrupt = [], [], {}
        for index, flip in keys:
            while isinstance(image := self.read(index), CorruptImage):
                corrupt[index] = image
                if not image.is_damaged or len(corrupt) > self.max_bad_images or len(corrupt) == len(self):
                    return Batch(None, None, list(corrupt.values()))
                index = substitute_index(index, len(self))
            images.append(image.flip(-1) if flip else image)
            labels.append(int(self.labels[index]))
        return Batch(torch.stack(images), {"y": torch.tensor(labels)}, list(corrupt.values()))

    def examples(self, count):
        """Read up to `count` evenly spaced images: those that can be read, shape (n, C, H, W), or None."""
        images = [self.read(index) for index in evenly_spaced_indices(len(self), count)]
        images = [image for image in images if not isinstance(image, CorruptImage)]
        return torch.stack(images) if images else None


def describe_dataset(dataset):
    """Return lines for the log: the classes, and what was noticed when the images were listed."""
    return [describe_classes(dataset.class_names), *getattr(dataset, "notes", [])]


@functools.cache
def _substitute_stride(length):
    """Return the smallest prime of at least `length`, and a step of about 0.618 of it."""
    prime = next(number for number in itertools.count(max(2, length))
                 if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)))
    return prime, round(0.618 * prime)


def substitute_index(index, length):
    """Return the index to read in place of a corrupt one; repeated, this reaches all indices below `length`.

    It is far away: corrupt neighbors, as a copy that broke off leaves them, get different substitutes.
    """
    prime, step = _substitute_stride(length)
    index = (index + step) % prime
    while index >= length:
        index = (index + step) % prime
    return index


def evenly_spaced_indices(length, count):
    """List `count` different indices below `length`, or all of them, at equal distances."""
    return torch.linspace(0, length - 1, count).long().unique().tolist()
