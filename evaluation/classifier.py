"""A small classifier of a data set, whose features compare images that Inception does not suit.

`evaluate.py --features FILE` takes it, and also reports how many samples are classified as their label. Distances in
its feature space are never called FID.
"""
import copy
import json
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import ArgumentError, UserError
from common.files import atomic_write
from common.seeding import WEIGHTS, derive_seed
from data.image_io import to_uint8
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from evaluation.features import ModuleFeatures, full_precision


def conv_block(channels_in, channels_out, stride=1):
    """Return a 3 x 3 convolution, batch normalization and ReLU."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(channels_out), nn.ReLU())


class ResidualBlock(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, channels):
        super().__init__()
        self.convolutions = nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))

    def forward(self, x):
        """Apply the block to x, shape (n, channels, H, W)."""
        return x + self.convolutions(x)


class Classifier(nn.Module):
    """A residual network from images to features and class logits.

    It has `width` channels at half the resolution; twice and four times as many at a quarter and an eighth.
    """

    def __init__(self, num_classes, width=32):
        super().__init__()
        self.trunk = nn.Sequential(conv_block(3, width, stride=2), ResidualBlock(width),
                                   conv_block(width, 2 * width, stride=2), ResidualBlock(2 * width),
                                   conv_block(2 * width, 4 * width, stride=2), ResidualBlock(4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        """Compute features, shape (n, 4 width), of images, shape (n, 3, H, W), uint8, of any size."""
        return self.trunk(images.float() / 127.5 - 1).mean(dim=(2, 3))

    @torch.jit.export
    def class_logits(self, features):
        """Compute class logits, shape (n, num_classes), of features, shape (n, 4 width)."""
        return self.head(features)


def train_classifier(dataset, device="cpu", steps=500, batch_size=128, lr=2e-3, width=32, seed=0, num_workers=0,
                     log=lambda step, loss: None):
    """Train a `Classifier` by AdamW and return it in evaluation mode.

    The result is a function of the data, the device and the numbers. The learning rate rises to `lr` over a tenth of
    the steps, then falls along a cosine. `log(step, loss)` is called after each step.

    Raises:
        ArgumentError: If the batch is larger than the data set.
        UserError: If an image cannot be read.
    """
    if batch_size > len(dataset):
        raise ArgumentError(f"there are {len(dataset)} images, not enough for one batch", batch_size=batch_size)
    torch.manual_seed(derive_seed(seed, WEIGHTS))
    device = torch.device(device)
    classifier = Classifier(len(dataset.class_names), width).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.01)
    batches = StepBatchSampler(len(dataset), batch_size, slice(0, batch_size), seed, 0, steps, flips=False)
    loader = PrefetchLoader(dataset, batches, num_workers, device, raise_corrupt)
    for step, (images, cond) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = F.cross_entropy(classifier.class_logits(classifier(to_classifier_input(images))), cond["y"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        log(step + 1, loss)
    return classifier.eval()


def to_classifier_input(images):
    """Convert images (n, C, H, W) in [-1, 1] to (n, 3, H, W) uint8, the format in which samples are classified."""
    return to_uint8(images).permute(0, 3, 1, 2)


def raise_corrupt(corrupt_images):
    """Raise a `UserError` for the first of a batch's corrupt images."""
    raise UserError(f"cannot read the image {corrupt_images[0].path} ({corrupt_images[0].reason})")


@torch.no_grad()
def compute_accuracy(classifier, dataset, batch_size=250):
    """Compute the fraction of a data set's images that a `Classifier` in evaluation mode classifies correctly."""
    device, correct = next(classifier.parameters()).device, 0
    for start in range(0, len(dataset), batch_size):
        keys = [(index, False) for index in range(start, min(start + batch_size, len(dataset)))]
        images, cond, corrupt = dataset.__getitems__(keys)
        if corrupt:
            raise_corrupt(corrupt)
        with full_precision():
            logits = classifier.class_logits(classifier(to_classifier_input(images).to(device)))
        correct += int((logits.argmax(dim=1).cpu() == cond["y"]).sum())
    return correct / len(dataset)


def save_classifier(classifier, path, data, class_names, accuracy):
    """Write a classifier in evaluation mode as a TorchScript file, to be used as a feature space.

    The file holds a description of the `data` it was trained on, its classes in their order, and its accuracy on images
    that it was not trained on.
    """
    metadata = json.dumps(dict(data=data, class_names=class_names, accuracy=accuracy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch recommends torch.export
        script = torch.jit.script(copy.deepcopy(classifier).cpu())
        with atomic_write(path) as file:
            torch.jit.save(script, file, _extra_files={ModuleFeatures.CLASSIFIER_METADATA: metadata})
