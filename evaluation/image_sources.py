"""Sets of images to evaluate: files, built-in data sets, or samples of a model."""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common import distributed
from common.errors import ArgumentError, UserError
from common.files import PickledArrayError, read_npz_array, sha256_file
from data import build_dataset
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.corrupt_images import CorruptImage
from data.image_io import read_image, read_image_size, to_uint8
from data.image_walk import describe_passed_over, walk_images
from evaluation.file_kinds import Purpose, list_arrays
from evaluation.records import try_read
from sampling.noise import PerSampleRNG
from sampling.sample_set import describe_sample_set, sample_labels


class GenerationInterrupted(Exception):
    """Generation of images stopped because `GeneratedImages.stopped` returned true."""


class ImageSource:
    """Base class of sets of images. A subclass has a length, `batch(start, end)` and `metadata()`.

    Attributes:
        hashes (bool): Whether to hash the pixels while they are read, because the metadata does not identify them.
        labels_problem (str): Why `class_labels` returns None, if it does.
    """

    hashes = False
    labels_problem = "the samples have no labels"

    def batch(self, start, end):
        """Return the images start .. end - 1, shape (end - start, H, W, 3), uint8."""
        raise NotImplementedError

    def example_batch(self):
        """Return up to two images of the set's size, shape (n, H, W, 3), uint8, at little cost."""
        return self.batch(0, min(2, len(self)))

    def class_labels(self):
        """Return the class that each image is meant to show, shape (N,), integers; None if unknown."""
        return None


class NpzImages(ImageSource):
    """Images of an .npz: `arr_0` (N, H, W, 3) uint8, as `sample_ddp.py` writes it and ADM's suite reads it."""

    def __init__(self, path):
        self.path = path
        self.arrays = list_arrays(path, Purpose())
        self.images = read_npz_array(path, "arr_0")
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise UserError(f"{path}: arr_0 is {self.images.dtype} of shape {self.images.shape}, not uint8 (0 .. 255) "
                            "of shape (N, H, W, 3)")
        if not self.images.size:
            raise UserError(f"{path} holds no images: arr_0 has the shape {self.images.shape}")
        self.record_path = os.path.splitext(path)[0] + ".json"
        self.sha256, self.sample_set = None, try_read(self.record_path)
        stored = self.sample_set.get("sha256")
        if isinstance(stored, str) and distributed.is_rank0() and stored.lower() != self._hash():
            print(f"WARNING: {path} does not have the SHA-256 in {self.record_path} beside it: one of them was changed "
                  "or damaged. How the images were made is left out of the record", flush=True)

    def _hash(self):
        self.sha256 = self.sha256 or sha256_file(self.path)
        return self.sha256

    def __len__(self):
        return len(self.images)

    def batch(self, start, end):
        """Return the images start .. end - 1, shape (end - start, H, W, 3), uint8."""
        return torch.from_numpy(np.array(self.images[start:end]))

    def class_labels(self):
        """Return `arr_1` as one label an image, if it can be taken as that."""
        if "arr_1" not in self.arrays:
            self.labels_problem = f"{self.path} has no labels (arr_1)"
            return None
        try:
            stored = np.asarray(read_npz_array(self.path, "arr_1"))
        except PickledArrayError:
            self.labels_problem = "arr_1 holds Python objects, not one whole number an image"
            return None
        labels = to_labels(stored, len(self))
        if labels is None:
            self.labels_problem = f"arr_1 is {stored.dtype} of shape {stored.shape}, not one whole number an image"
        return labels

    def metadata(self):
        """Describe the file, including what `sample_ddp.py` wrote beside it if the file has not changed since."""
        metadata = dict(path=os.path.abspath(self.path), images=len(self), sha256=self._hash())
        if str(self.sample_set.get("sha256")).lower() == metadata["sha256"]:
            metadata["made"] = self.sample_set.get("made")
        return metadata


def to_labels(values, count):
    """Convert whole numbers of any type, shape (count,) or (count, 1), or one-hot rows to labels (int64), else None."""
    if values.dtype.kind not in "iufb" or values.shape[:1] != (count,):
        return None
    if values.ndim == 2 and values.shape[1] > 1 and ((values == 0) | (values == 1)).all():
        return values.argmax(axis=1) if (values.sum(axis=1) == 1).all() else None
    values = values[:, 0] if values.shape == (count, 1) else values
    is_whole = values.ndim == 1 and (np.abs(values.astype(np.float64)) < 2**53).all() and (values == values // 1).all()
    return values.astype(np.int64) if is_whole else None


class FolderImages(ImageSource):
    """All image files below a folder, in the order of their paths, all of one size.

    Args:
        path (str): The folder.
        image_size (int): Scale and crop the images to this size, as training does. Default: take them as they are.

    Raises:
        UserError: If there are no images, or one cannot be read.
    """

    hashes = True
    NUM_READERS = 8  # threads; most of the work is decoding, which releases the interpreter lock

    def __init__(self, path, image_size=None):
        self.path, self.image_size = path, image_size
        folders, passed_over = walk_images(path)
        self.names = sorted(os.path.join(folder, name) for folder, names in folders.items() for name in names)
        self.passed_over = describe_passed_over(passed_over)
        if not self.names:
            reason = f" (passed over: {self.passed_over})" if self.passed_over else ""
            raise UserError(f"{path} holds no images{reason}")
        if self.passed_over:
            distributed.print_rank0(f"Passed over in {path}: {self.passed_over}")
        self.size = self._read(self.names[0]).shape[:2]
        if image_size is None:
            self._check_sizes(self.names[distributed.rank()::distributed.world_size()])

    def _check_sizes(self, names):
        """Compare the sizes in the headers of files, before hours go into measuring the first ones."""
        with ThreadPoolExecutor(self.NUM_READERS) as readers:
            paths = [os.path.join(self.path, name) for name in names]
            for path, size in zip(paths, readers.map(read_image_size, paths)):
                self._check_size(path, _or_raise(size))

    def _check_size(self, path, size):
        if size != self.size:
            (height, width), (first_height, first_width) = size, self.size
            raise ArgumentError(f"{path} has {width} x {height} pixels, others have {first_width} x {first_height}. "
                                "Pass the size to crop them to", image_size=None)

    def _read(self, name):
        return _or_raise(read_image(os.path.join(self.path, name), self.image_size))

    def __len__(self):
        return len(self.names)

    def batch(self, start, end):
        """Return the images start .. end - 1, shape (end - start, H, W, 3), uint8."""
        with ThreadPoolExecutor(self.NUM_READERS) as readers:
            images = list(readers.map(self._read, self.names[start:end]))
        for name, image in zip(self.names[start:end], images):
            self._check_size(os.path.join(self.path, name), image.shape[:2])  # it may have changed since
        return torch.from_numpy(np.stack(images))

    def metadata(self):
        """Describe the folder; the hash of the pixels is added after they are read."""
        return dict(path=os.path.abspath(self.path), images=len(self), image_size=self.image_size)


def _or_raise(image):
    """Return what was read of an image file; raise a `UserError` if it is corrupt."""
    if isinstance(image, CorruptImage):
        raise UserError(f"cannot read the image {image.path} ({image.reason})")
    return image


class BuiltinImages(ImageSource):
    """A built-in data set: `digits` or `fractals`, which are trained on, `digits-held-out` or `fractals-held-out`.

    Args:
        name (str): Name of the data set.
        image_size (int): Size of fractals; digits have one size. Default: that of the data set.
        num_classes (int): Number of classes of fractals. Default: that of the data set.
    """

    def __init__(self, name, image_size=None, num_classes=None):
        self.name = name
        dataset_name, _ = parse_builtin_name(name)
        if dataset_name != "fractals" or not image_size:
            image_size = BUILTIN_DATASETS[dataset_name]["image_size"]
        self.dataset = build_dataset(name, image_size, num_classes=num_classes)

    def __len__(self):
        return len(self.dataset)

    def batch(self, start, end):
        """Return the images start .. end - 1, shape (end - start, H, W, 3), uint8."""
        return to_uint8(torch.stack([self.dataset.read(index) for index in range(start, end)])).contiguous()

    def class_labels(self):
        """Return the labels of the data set."""
        return np.array(self.dataset.labels)

    def metadata(self):
        """Describe the data set."""
        return dict(path=self.name, images=len(self), image_size=self.dataset.image_size,
                    num_classes=len(self.dataset.class_names))


class GeneratedImages(ImageSource):
    """Samples of a model. Image i is a function of (seed, i), the same that `sample_ddp.py` makes.

    Args:
        pipeline (SamplingPipeline): Makes the images.
        num_classes (int): Number of classes to sample.
        num_fid_samples (int): Number of images.
        seed (int): Seed of labels and noise.
        labels (str): "uniform" or "balanced", see `sample_labels`.
        model_metadata (dict): Plain values that describe the model, for the record.

    Attributes:
        stopped (callable): () -> bool, called at every sampling step; if true, `batch` raises `GenerationInterrupted`.
    """

    def __init__(self, pipeline, num_classes, num_fid_samples, seed=0, labels="uniform", model_metadata=None):
        self.pipeline, self.num_classes, self.num_fid_samples = pipeline, num_classes, num_fid_samples
        self.seed, self.labels = seed, labels
        self.model_metadata = model_metadata or {}
        self.stopped = lambda: False

    def __len__(self):
        return self.num_fid_samples

    def batch(self, start, end):
        """Return the images start .. end - 1, shape (end - start, H, W, 3), uint8."""
        device, indices = self.pipeline.model.device, range(start, end)
        labels = sample_labels(self.labels, self.seed, indices, self.num_classes)
        cond = dict(y=torch.from_numpy(labels).to(device))
        return to_uint8(self.pipeline(cond, PerSampleRNG(self.seed, indices, device), on_step=self._check_stopped))

    def example_batch(self):
        """Return noise of the images' shape, which serves where only the size matters, without sampling."""
        _, *latent_size = self.pipeline.model.sample_shape
        height, width = (self.pipeline.autoencoder.stride * side for side in latent_size)
        return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8))

    def class_labels(self):
        """Return the label that each image is sampled with."""
        return sample_labels(self.labels, self.seed, range(len(self)), self.num_classes)

    def _check_stopped(self, step, x):
        if self.stopped():
            raise GenerationInterrupted

    def metadata(self):
        """Describe the images as `sample_ddp.py` does."""
        return describe_sample_set(self.pipeline, len(self), self.seed, self.labels, self.model_metadata)


def open_image_source(path, image_size=None, num_classes=None):
    """Open the images that a path names.

    Args:
        path (str): An .npz, a folder, or a built-in data set (see `BuiltinImages`).
        image_size (int): Size of the images of a folder, and of fractals.
        num_classes (int): Number of classes of fractals.

    Returns:
        ImageSource: The images.

    Raises:
        UserError: If there are no images at this path.
    """
    if parse_builtin_name(path)[0]:
        return BuiltinImages(path, image_size, num_classes)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        raise UserError(f"{path} is the folder of a run. Name one of its checkpoints, or {path}/samples")
    if os.path.isdir(path):
        return FolderImages(path, image_size)
    if not os.path.isfile(path):
        raise UserError(f"there is neither a file nor a folder {path}")
    return NpzImages(path)
