"""A small classifier of a data set: the space in which its images are compared where Inception knows nothing of them.

Its features are what `evaluate.py --features FILE` takes, and its classes are what samples are held against. Distances
in its space are never called FID.
"""

import copy
import json
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.files import atomic_write
from common.seeding import WEIGHTS, derive_seed
from data.image_io import to_uint8
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from evaluation.features import ModuleFeatures, full_precision


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width):
        super().__init__()
        self.convolutions = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x):
        return x + self.convolutions(x)


def convolution(width_in, width_out, stride=1):
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out),
                         nn.ReLU())


class Classifier(nn.Module):
    """Images (n, 3, H, W) uint8 of any size -> features (n, 4 width); features -> class logits.

    width  channels at half of the images' resolution; twice and four times as many at a quarter and an eighth
    """

    def __init__(self, num_classes, width=32):
        super().__init__()
        self.trunk = nn.Sequential(convolution(3, width, stride=2), Residual(width),
                                   convolution(width, 2 * width, stride=2), Residual(2 * width),
                                   convolution(2 * width, 4 * width, stride=2), Residual(4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        return self.trunk(images.float() / 127.5 - 1).mean(dim=(2, 3))

    @torch.jit.export
    def class_logits(self, features):
        return self.head(features)


def train_classifier(dataset, device="cpu", steps=500, batch_size=128, lr=2e-3, width=32, seed=0, num_workers=0,
                     log=lambda step, loss: None):
    """A `Classifier` of an `LabeledImageDataset`, trained by AdamW with a learning rate that rises and falls, in evaluation mode.

    It is a function of the data, the numbers here, and the device. log is called with (step, loss) after each step.
    raise  UserError for too large a batch, and for an image that cannot be read
    """
    if batch_size > len(dataset):
        raise UserError(f"--batch-size {batch_size}: there are {len(dataset)} images, not enough for one batch")
    torch.manual_seed(derive_seed(seed, WEIGHTS))
    device, classifier = torch.device(device), Classifier(len(dataset.class_names), width)
    classifier.to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.01)
    batches = StepBatchSampler(len(dataset), batch_size, slice(0, batch_size), seed, 0, steps, flips=False)
    for step, (images, cond) in enumerate(PrefetchLoader(dataset, batches, num_workers, device, on_corrupt=refuse)):
        for group in optimizer.param_groups:  # a tenth of the steps up, then down along a cosine
            group["lr"] = lr * min(10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = F.cross_entropy(classifier.class_logits(classifier(as_bytes(images))), cond["y"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        log(step + 1, loss)
    return classifier.eval()


def as_bytes(images):
    """(n, C, H, W) in [-1, 1] -> (n, 3, H, W) uint8: what the classifier will be asked about."""
    return to_uint8(images).permute(0, 3, 1, 2)


def refuse(bad):
    raise UserError(f"cannot read the image {bad[0].path} ({bad[0].reason})")


@torch.no_grad()
def accuracy(classifier, dataset, batch_size=250):
    """The share of a data set's images that are taken for what they are."""
    device, batch_size = next(classifier.parameters()).device, min(batch_size, len(dataset))
    right = 0
    for first in range(0, len(dataset), batch_size):
        images, cond, bad = dataset.__getitems__([(index, False) for index in range(
            first, min(first + batch_size, len(dataset)))])
        if bad:
            refuse(bad)
        with full_precision():
            logits = classifier.class_logits(classifier(as_bytes(images).to(device)))
        right += int((logits.argmax(dim=1).cpu() == cond["y"]).sum())
    return right / len(dataset)


def save_classifier(classifier, path, data, class_names, accuracy):
    """Write a classifier as a TorchScript file, for `--features`.

    data, class_names  what it was trained on, in words, and its classes in their order
    accuracy           on images that it was not trained on
    """
    about = json.dumps(dict(data=data, class_names=class_names, accuracy=accuracy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, as in `ModuleFeatures`
        script = torch.jit.script(copy.deepcopy(classifier).cpu())
        with atomic_write(path) as file:
            torch.jit.save(script, file, _extra_files={ModuleFeatures.ABOUT: about})
