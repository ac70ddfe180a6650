"""Sets of images to be measured: files, an embedded data set, or what a trained model makes.

Each has a length; batch(first, end) -> (n, H, W, 3) uint8; class_labels(), the class that each is to show, (N,)
integers, or None where nobody says; record(), what it is, in plain values; and `hashes`: whether its pixels are to be
hashed while they are read, because nothing else says what they are.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.errors import UserError
from common.files import list_npz_arrays, read_npz_array, sha256_file
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.corrupt_images import CorruptImage
from data.image_io import read_image, to_uint8
from evaluation.records import try_read
from sampling.noise import PerSampleRNG
from sampling.sample_set import describe_sample_set, sample_labels


class GenerationInterrupted(Exception):
    """The making of images was broken off: somebody wants the process back."""


class NpzImages:
    """The images of an .npz: `arr_0` (N, H, W, 3) uint8, as `sample_ddp.py` writes it and ADM's suite takes it."""

    hashes = False

    def __init__(self, path):
        self.path, self.images = path, read_npz_array(path, "arr_0")
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {self.images.dtype} of the shape {self.images.shape}, not uint8 of "
                            "(N, H, W, 3)")
        if not len(self.images):
            raise UserError(f"{path} holds no images: arr_0 is empty")

    def __len__(self):
        return len(self.images)

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8."""
        return torch.from_numpy(np.array(self.images[first:end]))

    def class_labels(self):
        """`arr_1`, where there is one an image."""
        if "arr_1" not in list_npz_arrays(self.path):
            return None
        labels = np.asarray(read_npz_array(self.path, "arr_1"))
        return labels if labels.dtype.kind in "iu" and labels.shape == (len(self),) else None

    def metadata(self):
        """Where they come from; with what `sample_ddp.py` wrote beside the file, if it still is that file."""
        found = dict(path=os.path.abspath(self.path), images=len(self), sha256=sha256_file(self.path))
        beside = try_read(os.path.splitext(self.path)[0] + ".json")
        return found | dict(made=beside.get("made")) if beside.get("sha256") == found["sha256"] else found


class FolderImages:
    """All image files below a folder, in the order of their paths, all of one size.

    image_size  scale and crop them to so many pixels, as training does; None: take them as they are
    raise       UserError where there are none, or one cannot be read
    """

    hashes = True
    ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
    READERS = 8  # threads: most of the work is decoding, which they do side by side

    def __init__(self, path, image_size=None):
        self.path, self.image_size, self.names = path, image_size, sorted(self._files(path))
        if not self.names:
            raise UserError(f"{path} holds no images ({', '.join(self.ENDINGS)})")
        self.size = self._read(self.names[0]).shape[:2]

    def _files(self, root):
        """Paths below `root`. Links are followed, into each folder once."""
        seen = set()
        for folder, inner, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            yield from (os.path.relpath(os.path.join(folder, name), root) for name in names
                        if name.lower().endswith(self.ENDINGS))

    def _read(self, name):
        image = read_image(os.path.join(self.path, name), self.image_size)
        if isinstance(image, CorruptImage):
            raise UserError(f"cannot read the image {image.path} ({image.reason})")
        return image

    def __len__(self):
        return len(self.names)

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8. raise: UserError for one of another size than the first."""
        names = self.names[first:end]
        with ThreadPoolExecutor(self.READERS) as readers:
            images = list(readers.map(self._read, names))
        for name, image in zip(names, images):
            if image.shape[:2] != self.size:
                (height, width), (first_height, first_width) = image.shape[:2], self.size
                raise UserError(f"{os.path.join(self.path, name)} has {width} x {height} pixels, others have "
                                f"{first_width} x {first_height}: pass --image-size")
        return torch.from_numpy(np.stack(images))

    def class_labels(self):
        return None

    def metadata(self):
        return dict(path=os.path.abspath(self.path), images=len(self), image_size=self.image_size)


class BuiltinImages:
    """An embedded data set: `digits`, `fractals`, which are trained on, or `digits-held-out`, `fractals-held-out`.

    image_size, num_classes  of the fractals; None: as usual
    """

    hashes = False

    def __init__(self, name, image_size=None, num_classes=None):
        self.name, (data, _) = name, parse_builtin_name(name)
        chosen = image_size if data == "fractals" else None
        self.data = build_dataset(name, chosen or BUILTIN_DATASETS[data]["image_size"], num_classes=num_classes)

    def __len__(self):
        return len(self.data)

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8."""
        return to_uint8(torch.stack([self.data.read(index) for index in range(first, end)])).contiguous()

    def class_labels(self):
        return np.array(self.data.labels)

    def metadata(self):
        return dict(path=self.name, images=len(self), image_size=self.data.image_size,
                    num_classes=len(self.data.class_names))


class GeneratedImages:
    """What a trained model makes: image i is a function of (seed, i), the one that `sample_ddp.py` makes too.

    make     an `SamplingPipeline`
    labels   "uniform" or "balanced", see `sample_labels`
    made_of  what else is to be recorded of them, a plain dictionary

    Its attribute `stopped` is asked at every sampling step whether to break off, by `GenerationInterrupted`.
    """

    hashes = False

    def __init__(self, make, num_classes, count, seed=0, labels="uniform", made_of=None):
        self.make, self.num_classes, self.count, self.seed, self.labels = make, num_classes, count, seed, labels
        self.made_of, self.stopped = made_of or {}, lambda: False

    def __len__(self):
        return self.count

    def batch(self, first, end):
        """Images first .. end - 1: (n, H, W, 3) uint8."""
        device, numbers = self.make.model.pos_embed.device, range(first, end)
        labels = sample_labels(self.labels, self.seed, numbers, self.num_classes)
        return to_uint8(self.make(torch.from_numpy(labels).to(device), PerSampleRNG(self.seed, numbers, device),
                                  on_step=self._go_on))

    def class_labels(self):
        return sample_labels(self.labels, self.seed, range(self.count), self.num_classes)

    def _go_on(self, step, x):
        if self.stopped():
            raise GenerationInterrupted

    def noise_like(self, count):
        """(count, H, W, 3) uint8 noise of the images' size, without the work of making one."""
        autoencoder, model = self.make.autoencoder, self.make.model
        stride = autoencoder.stride
        height, width = (stride * side for side in model.x_embedder.input_size)
        return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))

    def metadata(self):
        return describe_sample_set(self.make, len(self), self.seed, self.labels, self.made_of)


def open_image_source(path, image_size=None, num_classes=None):
    """The images that a path names: an .npz, a folder, `digits` or `fractals` (which are trained on), `digits-held-out`
    or `fractals-held-out`.

    image_size   of a folder's and of the fractals
    num_classes  of the fractals
    """
    if parse_builtin_name(path)[0]:
        return BuiltinImages(path, image_size, num_classes)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        raise UserError(f"{path} is the folder of a run: name one of its checkpoints, or {path}/samples")
    if os.path.isdir(path):
        return FolderImages(path, image_size)
    if not os.path.isfile(path):
        raise UserError(f"there is neither a file nor a folder {path}")
    if "arr_0" not in list_npz_arrays(path):
        raise UserError(f"{path} holds no images: there is no arr_0 in it")
    return NpzImages(path)
