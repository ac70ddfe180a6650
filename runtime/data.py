"""Training images, and the order in which they are seen."""
import collections
import contextlib
import os
import signal
import warnings
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import UserError
from .images import BadImage, read_image
from .randomness import DATA_ORDER, FLIP, generator
from .signals import Postponed, leave_to_master

# How many workers there are is said by a flag; where the cores are fewer, they wait for each other, and that is all.
warnings.filterwarnings("ignore", "This DataLoader will create")


class Batch(NamedTuple):
    """What a data set answers for a list of (index, flip).

    images  (n, C, H, W) in [-1, 1], or whatever the codec of the data takes
    labels  (n,) integers
    bad     the `BadImage`s met on the way; where they are too many, images and labels are None
    """
    images: torch.Tensor
    labels: torch.Tensor
    bad: list


class ImageData(Dataset):
    """Images with labels, asked for in batches of (index, flip).

    A subclass has channels, flips (does a mirror image belong to the same class?), class_names, labels and paths
    (lists, one entry an image), and read(index) -> (C, H, W) float32 in [-1, 1], or a `BadImage`.

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
            while isinstance(image := self.read(index), BadImage):
                bad[index] = image
                if not image.is_damaged or len(bad) > self.max_bad_images or len(bad) == len(self):
                    return Batch(None, None, list(bad.values()))
                index = (index + 1) % len(self)
            images.append(image.flip(-1) if flip else image)
            labels.append(self.labels[index])
        return Batch(torch.stack(images), torch.tensor(labels), list(bad.values()))

    def examples(self, count):
        """Up to `count` images that can be read, from all over the data set: (n, C, H, W), or None."""
        read = [self.read(index) for index in spread(len(self), count)]
        images = [image for image in read if not isinstance(image, BadImage)]
        return torch.stack(images) if images else None


class ImageFolderData(ImageData):
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
        if isinstance(image, BadImage):
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        return (pixels / 255 - 0.5) / 0.5


def spread(length, count):
    """`count` different indices below `length`, or all, at equal distances."""
    return torch.linspace(0, length - 1, count).long().unique().tolist()


# The data sets that need no files, with their sizes where nothing else is asked for. NAME-held-out is for measuring.
EMBEDDED = dict(digits=dict(image_size=8, num_classes=10), fractals=dict(image_size=32, num_classes=100))


def embedded(data_path):
    """The name and the split ("train", "held-out") of an embedded data set; (None, None) of any other path."""
    name = (data_path or "").removesuffix("-held-out")
    return (name, "train" if name == data_path else "held-out") if name in EMBEDDED else (None, None)


def open_data(data_path, image_size, max_bad_images=0, num_classes=None):
    """The data set that a path names: "digits", "fractals", one of them with "-held-out", or a folder of class folders.

    num_classes  of the fractals, which have as many as are asked for; None: as usual
    """
    name, split = embedded(data_path)
    if name is None:
        return ImageFolderData(data_path, image_size, max_bad_images)
    if name == "fractals":
        from .fractals import FractalsData
        return FractalsData(image_size, num_classes or EMBEDDED[name]["num_classes"], split)
    from .digits import DigitsData
    if image_size != DigitsData.image_size:
        raise UserError(f"--image-size {image_size}: the digits are {DigitsData.image_size} pixels wide, "
                        f"pass --image-size {DigitsData.image_size} or leave it out")
    return DigitsData(split)


class BadImages:
    """Counts and names the images of a run that could not be read; one too many ends the run.

    They are listed in a file, which all processes of a run and all its restarts share.
    limit  --max-bad-images
    path   of the list: a line is the image's path, a tab, and the reason
    warn   called with a sentence for every new one
    """

    def __init__(self, limit, path, warn):
        self.limit, self.path, self.warn = limit, path, warn

    def add(self, bad):
        """Count a batch's `BadImage`s; raises a `UserError` for one too many, and for one that is not damaged."""
        for image in bad:
            check_readable(image)
            known = self._known()
            if image.path in known:
                continue
            if len(known) >= self.limit:
                raise UserError(too_many(image, len(known) + 1, self.limit))
            with open(self.path, "ab") as file:  # appended in one write: lines of several processes do not mix
                file.write(f"{image.path}\t{image.reason}\n".encode(errors="surrogateescape"))
            self.warn(f"WARNING: skipped the image {image.path} ({image.reason}), "
                      f"{len(known) + 1} of {self.limit} that --max-bad-images allows")

    def _known(self):
        if not os.path.exists(self.path):
            return set()
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return {line.split("\t")[0] for line in file}


def check_readable(image):
    """A file that cannot be read is no damaged image: what a run sees must not hang on the state of a disk."""
    if not image.is_damaged:
        raise UserError(f"cannot read {image.path} ({image.reason})")


def too_many(image, count, limit):
    """The sentence that ends a run at a bad image."""
    met = f", number {count} in all; --max-bad-images {limit} allows no more" if limit else ""
    return f"cannot read the image {image.path} ({image.reason}){met}. Repair it, or allow more with --max-bad-images"


def own_rows(accelerator, global_batch_size, parts):
    """The slice of the global batch that this process computes, in so many parts. raise: `UserError`"""
    world = accelerator.num_processes
    if global_batch_size % (world * parts):
        raise UserError(f"--global-batch-size {global_batch_size} cannot be shared by {world} processes "
                        f"in {parts} parts each (--grad-accum-steps): it must be a multiple of {world * parts}")
    share = global_batch_size // world
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


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
                order, order_epoch = self._order(epoch), epoch
            start = batch * self.global_batch_size
            items = order[start:start + self.global_batch_size][self.rows]
            yield list(zip(items.tolist(), self._flips(step)[self.rows]))

    def _order(self, epoch):
        return torch.randperm(self.num_items, generator=generator(self.seed, DATA_ORDER, epoch))

    def items(self, step):
        """The indices of a step's whole global batch: a list a process."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        items = self._order(epoch)[batch * self.global_batch_size:][:self.global_batch_size].tolist()
        share = self.rows.stop - self.rows.start
        return [items[first:first + share] for first in range(0, len(items), share)]

    def _flips(self, step):
        if not self.flips:
            return [False] * self.global_batch_size
        return (torch.rand(self.global_batch_size, generator=generator(self.seed, FLIP, step)) < 0.5).tolist()


class BatchLoader:
    """The batches that a `GlobalBatches` asks for, loaded ahead: pairs of images (n, C, H, W) and labels (n,).

    So a fault is known two steps before the batch that it concerns is missed: time for all processes to hear of it
    (`Watch`) and to stop after the same step. It is in `fault`, an exception, and is raised where the batches end.

    num_workers  worker processes; 0: load in this one
    on_bad       called with the `BadImage`s of each batch, if any; it must raise where a batch could not be filled
    """

    AHEAD = 2

    def __init__(self, data, batches, num_workers, device, on_bad):
        self.device, self.on_bad = device, on_bad
        self.pinned = device.type == "cuda" and not data.on_device
        self.num_workers = num_workers = 0 if data.on_device else num_workers
        loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, collate_fn=whole_batch,
                            pin_memory=self.pinned, prefetch_factor=4 if num_workers else None,
                            worker_init_fn=leave_to_master)
        self.fault, self.queue, self.source = None, collections.deque(), iter(loader)
        # torch answers the death of a worker with an exception wherever this process happens to be, in the middle of
        # the optimiser's step too. Here it comes where a batch is waited for.
        self.deaths = Postponed.of(signal.SIGCHLD) if num_workers else contextlib.nullcontext()
        self._load(self.AHEAD)
        self.check()

    def __iter__(self):
        while True:
            self._load(self.AHEAD + 1)
            if not self.queue:
                return self.check()
            yield self.queue.popleft()

    def _load(self, count):
        """Have `count` batches in the queue, or what there is up to the end or to a fault."""
        try:
            while self.source is not None and len(self.queue) < count:
                with self.deaths:
                    images, labels, bad = next(self.source)
                if bad:
                    self.on_bad(bad)
                self.queue.append((images.to(self.device, non_blocking=self.pinned),
                                   labels.to(self.device, non_blocking=self.pinned)))
        except StopIteration:
            self.source = None
        except Exception as error:
            self.source, self.fault = None, (self.num_workers and worker_is_gone(error)) or error

    def check(self):
        """Raise the fault, if there is one."""
        if self.fault:
            raise self.fault


def worker_is_gone(error):
    """What is met where a worker died, as a sentence with what to do; None of any other error."""
    told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    if told or isinstance(error, (ConnectionError, EOFError)):  # the latter where it died while it was sending
        return UserError(f"a process that loads data died: {str(error).rstrip('. ')}. Where memory is short, lower "
                         "--num-workers")
    return None


def whole_batch(batch):
    """Data sets answer with whole batches: nothing is left to collate."""
    return batch
