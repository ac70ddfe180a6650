"""The interface of a data set: labeled images, read in batches."""
import warnings
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from data.corrupt_images import CorruptImage

# How many workers there are is said by a flag; where the cores are fewer, they wait for each other, and that is all.
warnings.filterwarnings("ignore", "This DataLoader will create")


class Batch(NamedTuple):
    """What a data set answers for a list of (index, flip).

    images  (n, C, H, W) in [-1, 1], or whatever the codec of the data takes
    labels  (n,) integers
    bad     the `CorruptImage`s met on the way; where they are too many, images and labels are None
    """
    images: torch.Tensor
    labels: torch.Tensor
    bad: list


class LabeledImageDataset(Dataset):
    """Images with labels, asked for in batches of (index, flip).

    A subclass has channels, flips (does a mirror image belong to the same class?), class_names, labels and paths
    (lists, one entry an image), and read(index) -> (C, H, W) float32 in [-1, 1], or a `CorruptImage`.

    An image that cannot be read is replaced by the next one that can, in the order of the data set: so the images
    that a run sees stay a function of the data and the seed.
    """

    on_device = False  # batches come from host memory
    max_bad_images = 0  # more than so many different bad images in one batch, and it is given up

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        images, labels, bad = [], [], {}
        for index, flip in keys:
            while isinstance(image := self.read(index), CorruptImage):
                bad[index] = image
                if not image.is_damaged or len(bad) > self.max_bad_images or len(bad) == len(self):
                    return Batch(None, None, list(bad.values()))
                index = (index + 1) % len(self)
            images.append(image.flip(-1) if flip else image)
            labels.append(self.labels[index])
        return Batch(torch.stack(images), torch.tensor(labels), list(bad.values()))

    def examples(self, count):
        """Up to `count` images that can be read, from all over the data set: (n, C, H, W), or None."""
        read = [self.read(index) for index in evenly_spaced_indices(len(self), count)]
        images = [image for image in read if not isinstance(image, CorruptImage)]
        return torch.stack(images) if images else None


def evenly_spaced_indices(length, count):
    """`count` different indices below `length`, or all, at equal distances."""
    return torch.linspace(0, length - 1, count).long().unique().tolist()
