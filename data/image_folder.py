"""A data set of images in one folder per class."""
import os
from typing import NamedTuple

import numpy as np
import torch

from common.errors import ArgumentError
from data.corrupt_images import CorruptImage
from data.dataset import LabeledImageDataset
from data.image_io import read_image
from data.path_list import PathList


class ImageListing(NamedTuple):
    """Classes and files of a folder; `labels` and `paths` (relative to it) have one entry per image."""

    class_names: list[str]
    labels: np.ndarray
    paths: PathList


class ImageFolderDataset(LabeledImageDataset):
    """Images in one folder per class, `root/class_name/**/*.jpg`; classes are numbered in the order of their names.

    Args:
        root (str): The folder of class folders.
        image_size (int): Pixels a side to which images are scaled and cropped.
        max_bad_images (int): Number of corrupt images in a batch above which it cannot be read.
        listing (ImageListing): What `list_image_folder(root)` returns, if it is known.
    """

    channels = 3
    flips = True

    def __init__(self, root, image_size, max_bad_images=0, listing=None):
        self.root, self.image_size, self.max_bad_images = os.path.abspath(root), image_size, max_bad_images
        self.class_names, self.labels, self.paths = listing or list_image_folder(root)

    def read(self, index):
        """Return image `index`, shape (3, image_size, image_size), float32 in [-1, 1], or a `CorruptImage`."""
        image = read_image(os.path.join(self.root, self.paths[index]), self.image_size)
        if isinstance(image, CorruptImage):
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        return (pixels / 255 - 0.5) / 0.5


def list_image_folder(data_path):
    """List the images of a folder: the classes, files and order of torchvision's `ImageFolder`.

    Raises:
        ArgumentError: If there is no such folder, no class, or a class without images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS
    if not os.path.isdir(data_path):
        raise ArgumentError("there is no such folder", data_path=data_path)
    with os.scandir(data_path) as entries:
        class_names = sorted(entry.name for entry in entries if entry.is_dir())
    paths, counts = PathList(), []
    for name in class_names:
        num_before = len(paths)
        for folder, _, files in sorted(os.walk(os.path.join(data_path, name), followlinks=True)):
            prefix = os.path.relpath(folder, data_path)
            paths.extend(f"{prefix}/{file}" for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS))
        counts.append(len(paths) - num_before)
    empty = [name for name, count in zip(class_names, counts) if not count]
    if empty or not class_names:
        problem = f"no images in the class folders {', '.join(empty)}" if empty else "there are no class folders in it"
        raise ArgumentError(f"{problem}. Expected one folder per class, with images in it: "
                            f"{os.path.join(data_path, 'CLASS', 'IMAGE.jpg')}", data_path=data_path)
    return ImageListing(class_names, np.repeat(np.arange(len(counts)), counts), paths)
