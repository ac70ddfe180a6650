"""Sets of images to be measured: files, the embedded digits, or what a trained model makes."""
import json
import os

import numpy as np
import torch

from runtime import checksum
from runtime.data import open_data
from runtime.errors import UserError
from runtime.generate import SampleNoise, to_uint8
from runtime.images import BadImage, read_image
from runtime.npz import npz_array, npz_names
from runtime.sample_set import sample_labels, set_record


class NpzImages:
    """The images of an .npz: `arr_0` (N, H, W, 3) uint8, as `sample_ddp.py` writes it and ADM's suite takes it."""

    def __init__(self, path):
        self.path, self.images = path, npz_array(path, "arr_0")
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {self.images.dtype} of the shape {self.images.shape}, not uint8 of "
                            "(N, H, W, 3)")

    def __len__(self):
        return len(self.images)

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8."""
        return torch.from_numpy(np.array(self.images[first:end]))

    def record(self):
        """Where they come from; with what `sample_ddp.py` wrote beside the file, if it still is that file."""
        found = dict(path=os.path.abspath(self.path), images=len(self), sha256=checksum.of_file(self.path))
        try:
            with open(os.path.splitext(self.path)[0] + ".json", encoding="utf-8") as file:
                beside = json.load(file)
            return found | dict(made=beside["made"]) if beside["sha256"] == found["sha256"] else found
        except (OSError, ValueError, LookupError, TypeError):
            return found


class FolderImages:
    """All image files below a folder, in the order of their paths.

    image_size  scale and crop them to so many pixels, as training does; None: take them as they are
    """

    ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")

    def __init__(self, path, image_size=None):
        self.path, self.image_size = path, image_size
        self.names = sorted(os.path.relpath(os.path.join(folder, name), path)
                            for folder, _, names in os.walk(path, followlinks=True) for name in names
                            if name.lower().endswith(self.ENDINGS))
        if not self.names:
            raise UserError(f"{path} holds no images ({', '.join(self.ENDINGS)})")

    def __len__(self):
        return len(self.names)

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8. raise: UserError for one that cannot be read, or is of
        another size."""
        images = []
        for name in self.names[first:end]:
            image = read_image(os.path.join(self.path, name), self.image_size)
            if isinstance(image, BadImage):
                raise UserError(f"cannot read the image {image.path} ({image.reason})")
            if images and image.shape != images[0].shape:
                (height, width), (first_height, first_width) = image.shape[:2], images[0].shape[:2]
                raise UserError(f"{os.path.join(self.path, name)} has {width} x {height} pixels, others have "
                                f"{first_width} x {first_height}: pass --image-size")
            images.append(image)
        return torch.from_numpy(np.stack(images))

    def record(self):
        return dict(path=os.path.abspath(self.path), images=len(self), image_size=self.image_size,
                    names_sha256=checksum.of_value(self.names))


class DigitsImages:
    """The embedded digits: `digits`, those that are trained on, or `digits-held-out`."""

    def __init__(self, name):
        self.name, digits = name, open_data(name, image_size=8)
        self.images = to_uint8(digits.images).contiguous()

    def __len__(self):
        return len(self.images)

    def batch(self, first, end):
        """Images first .. end - 1: (n, 8, 8, 3) uint8."""
        return self.images[first:end]

    def record(self):
        return dict(path=self.name, images=len(self))


class GeneratedImages:
    """What a trained model makes: image i is a function of (seed, i), the one that `sample_ddp.py` makes too.

    make     an `ImageMaker`
    labels   "uniform" or "balanced", see `sample_labels`
    made_of  what else is to be recorded of them, a plain dictionary
    """

    def __init__(self, make, num_classes, count, seed=0, labels="uniform", made_of=None):
        self.make, self.num_classes, self.count, self.seed, self.labels = make, num_classes, count, seed, labels
        self.made_of = made_of or {}

    def __len__(self):
        return self.count

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8."""
        device, numbers = self.make.model.pos_embed.device, range(first, end)
        labels = sample_labels(self.labels, self.seed, numbers, self.num_classes)
        return to_uint8(self.make(torch.from_numpy(labels).to(device), SampleNoise(self.seed, numbers, device)))

    def record(self):
        return set_record(self.make, len(self), self.seed, self.labels, self.made_of)


def open_images(path, image_size=None):
    """The images that a path names: an .npz, a folder, `digits` (which are trained on) or `digits-held-out`."""
    if path in ("digits", "digits-held-out"):
        return DigitsImages(path)
    if os.path.isdir(path):
        return FolderImages(path, image_size)
    if not os.path.isfile(path):
        raise UserError(f"there is neither a file nor a folder {path}")
    if "arr_0" not in npz_names(path):
        raise UserError(f"{path} holds no images: there is no arr_0 in it")
    return NpzImages(path)
