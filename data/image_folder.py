"""A data set of images in one folder per class."""
import os
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from common.errors import ArgumentError
from data.class_names import printable, suspicious_names
from data.corrupt_images import CorruptImage
from data.dataset import LabeledImageDataset
from data.dataset_json import LABELS_FILE, read_labels
from data.image_io import read_image
from data.image_walk import OUTSIDE, describe_passed_over, walk_images
from data.path_list import PathList


class ImageListing(NamedTuple):
    """Classes and files of a folder; `labels` and `paths` (relative to it) have one entry per image."""

    class_names: list[str]
    labels: np.ndarray
    paths: PathList
    notes: list[str]  # lines for the log


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
        self.class_names, self.labels, self.paths, self.notes = listing or list_image_folder(root)

    def read(self, index):
        """Return image `index`, shape (3, image_size, image_size), float32 in [-1, 1], or a `CorruptImage`."""
        image = read_image(os.path.join(self.root, self.paths[index]), self.image_size)
        if isinstance(image, CorruptImage):
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        return (pixels / 255 - 0.5) / 0.5


def list_image_folder(data_path):
    """List the images of a folder in the order of torchvision's `ImageFolder`; see `walk_images` for which they are.

    The classes are the folders in it, or, beside folders that are only numbered, the labels of a dataset.json.

    Raises:
        ArgumentError: If there is no such folder, no class, or a class folder without images.
    """
    if not os.path.isdir(data_path):
        is_file = os.path.exists(data_path)
        raise ArgumentError("it is a file. Unpack it, and name the folder" if is_file else "there is no such folder",
                            data_path=data_path)
    folders, passed_over = walk_images(data_path)
    if os.path.isfile(os.path.join(data_path, LABELS_FILE)):
        is_numbered = all(re.fullmatch(r"\d{5}", folder.split(os.sep)[0]) for folder in folders if folder)
        labels = read_labels(data_path) if is_numbered else None
        if labels:
            return _list_labeled(data_path, folders, passed_over, labels)
        reason = "it has no labels" if is_numbered else "the folders have names"
        notes = [f"WARNING: {LABELS_FILE} is not read ({reason}): the folders are taken for the classes"]
    else:
        notes = []
    passed_over[OUTSIDE] = len(folders.pop(""))
    class_names = sorted({folder.split(os.sep)[0] for folder in folders})
    paths, counts = PathList(), Counter()
    for folder in sorted(folders, key=lambda folder: (folder.split(os.sep)[0], folder)):
        paths.extend(f"{folder}/{name}" for name in folders[folder])
        counts[folder.split(os.sep)[0]] += len(folders[folder])
    empty = [printable(name) for name in class_names if not counts[name]]
    if empty or not class_names:
        problem = f"no images in the class folders {', '.join(empty)}" if empty else "there are no class folders in it"
        passed = describe_passed_over(passed_over)
        raise ArgumentError(f"{problem}{f' (passed over: {passed})' if passed else ''}. Expected one folder per class, "
                            f"with images in it: {os.path.join(data_path, 'CLASS', 'IMAGE.jpg')}", data_path=data_path)
    labels = np.repeat(np.arange(len(class_names)), [counts[name] for name in class_names])
    return ImageListing(class_names, labels, paths, notes + _notes(data_path, class_names, passed_over))


def _list_labeled(data_path, folders, passed_over, labels):
    """List images whose classes are {relative path: number}; a class is named by its number."""
    paths = PathList(os.path.join(folder, name) for folder in sorted(folders) for name in folders[folder])
    missing = [path for path in paths if path not in labels]
    if missing or not paths:
        problem = f"has no label for {len(missing)} images, such as {missing[0]}" if missing else "is beside no images"
        raise ArgumentError(f"{LABELS_FILE} {problem}. Repair or remove it", data_path=data_path)
    notes = [f"Labels are read from {LABELS_FILE}; the folders are not the classes"]
    if len(labels) > len(paths):
        notes.append(f"WARNING: {LABELS_FILE} has labels of {len(labels) - len(paths)} files that are not there")
    values = np.array([labels[path] for path in paths], dtype=np.int64)
    counts = np.bincount(values)
    if not counts.all():
        notes.append(f"WARNING: {(counts == 0).sum()} of {len(counts)} class numbers have no image and will not be "
                     f"learned, such as {counts.argmin()}")
    class_names = [str(number) for number in range(len(counts))]
    return ImageListing(class_names, values, paths, notes + _notes(data_path, class_names, passed_over))


def _notes(data_path, class_names, passed_over):
    passed = describe_passed_over(passed_over)
    return [*suspicious_names(class_names), *([f"Passed over in {data_path}: {passed}"] if passed else [])]
