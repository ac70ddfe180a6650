"""A data set of images in one folder per class."""
import os

import torch

from common.errors import UserError
from data.corrupt_images import CorruptImage
from data.dataset import LabeledImageDataset
from data.image_io import read_image


class ImageFolderDataset(LabeledImageDataset):
    """Images in one folder a class, `root/class_name/*.jpg`; classes are numbered in the order of their names."""

    channels = 3
    flips = True

    def __init__(self, root, image_size, max_bad_images=0):
        from torchvision.datasets import ImageFolder
        if not os.path.isdir(root):
            raise UserError(f"--data-path {root}: there is no such folder")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            # torchvision names the empty classes, or says that there is no class folder at all
            reason = str(error).rstrip(".")
            raise UserError(f"--data-path {root}: {reason}. Expected one folder a class, with images in each: "
                            f"{os.path.join(root, 'CLASS', 'IMAGE.jpg')}") from None
        self.root, self.image_size, self.max_bad_images = os.path.abspath(root), image_size, max_bad_images
        self.class_names, self.labels = folder.classes, folder.targets
        self.paths = [os.path.relpath(path, root) for path, _ in folder.samples]

    def read(self, index):
        image = read_image(os.path.join(self.root, self.paths[index]), self.image_size)
        if isinstance(image, CorruptImage):
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        return (pixels / 255 - 0.5) / 0.5
