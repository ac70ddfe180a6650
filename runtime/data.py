"""Training images, and the order in which they are seen."""
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import UserError
from .randomness import DATA_ORDER, FLIP, generator


def center_crop(image, size):
    """ADM's preprocessing: a PIL image -> the `size` x `size` centre of it, its shorter side scaled to `size`.

    Halved by box filtering while twice as large as needed, then scaled bicubically: sharper than one bicubic step and
    free of aliasing (the published latents and reference statistics are made so).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass
class BadImage:
    """An image that could not be read. Workers hand it over as a value, so that its sentence arrives whole."""
    path: str
    reason: str


class ImageFolderData(Dataset):
    """Images in one folder a class, `root/class_name/*.jpg`; classes are numbered in the order of their names.

    An item is asked for as (index, flip) and is (image, label): image (3, size, size) float32 in [-1, 1].
    """

    channels = 3
    flips = True

    def __init__(self, root, image_size):
        from torchvision.datasets import ImageFolder
        if not os.path.isdir(root):
            raise UserError(f"--data-path {root}: there is no such folder")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            # torchvision names the empty classes, or says that there is no class folder at all
            raise UserError(f"--data-path {root}: {error}. Expected one folder a class, with images in each: "
                            f"{os.path.join(root, 'CLASS', 'IMAGE.jpg')}") from None
        self.samples, self.class_names, self.image_size = folder.samples, folder.classes, image_size

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, flip = key
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = center_crop(file.convert("RGB"), self.image_size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return BadImage(path, f"{type(error).__name__}: {error}")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        image = (pixels / 255 - 0.5) / 0.5
        return image.flip(-1) if flip else image, label


def open_data(data_path, image_size):
    """The data set that --data-path names: "digits", or a folder of class folders."""
    if data_path != "digits":
        return ImageFolderData(data_path, image_size)
    from .digits import DigitsData
    if image_size != DigitsData.image_size:
        raise UserError(f"--image-size {image_size}: the digits are {DigitsData.image_size} pixels wide, "
                        f"pass --image-size {DigitsData.image_size} or leave it out")
    return DigitsData()


class GlobalBatches(Sampler):
    """For each training step, which items this process loads: a function of (seed, step, rows) alone.

    Every epoch is a new permutation of the data set, cut in global batches; what is left over at its end is not seen
    in that epoch. Yields lists of (index, flip).

    rows         slice of the global batch that this process computes
    first, last  steps first .. last - 1
    flips        mirror each image with probability 1/2
    """

    def __init__(self, num_items, global_batch_size, rows, seed, first, last, flips):
        self.steps_per_epoch = num_items // global_batch_size
        self.num_items, self.global_batch_size, self.rows = num_items, global_batch_size, rows
        self.seed, self.first, self.last, self.flips = seed, first, last, flips

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        order, order_epoch = None, None
        for step in range(self.first, self.last):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = torch.randperm(self.num_items, generator=generator(self.seed, DATA_ORDER, epoch)).tolist()
                order_epoch = epoch
            start = batch * self.global_batch_size
            items = order[start:start + self.global_batch_size][self.rows]
            yield list(zip(items, self._flips(step)[self.rows]))

    def _flips(self, step):
        if not self.flips:
            return [False] * self.global_batch_size
        return (torch.rand(self.global_batch_size, generator=generator(self.seed, FLIP, step)) < 0.5).tolist()


def load_batches(data, batches, num_workers, device):
    """Load what `batches` (a `GlobalBatches`) asks for: pairs of images (n, C, H, W) and labels (n,) on `device`.

    num_workers  worker processes; 0: load in this one
    raise        UserError at the first image that cannot be read, with its path
    """
    loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
                        pin_memory=device.type == "cuda", prefetch_factor=4 if num_workers else None)
    for batch in loader:
        if isinstance(batch, BadImage):
            raise UserError(f"cannot read the image {batch.path} ({batch.reason}); repair or remove it")
        yield tuple(tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)


def collate(items):
    """[(image, label), ...] -> (images, labels), or the first `BadImage` among them."""
    bad = next((item for item in items if isinstance(item, BadImage)), None)
    if bad is not None:
        return bad
    images, labels = zip(*items)
    return torch.stack(images), torch.tensor(labels)
