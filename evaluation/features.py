"""Feature spaces in which sets of images are compared."""
import contextlib
import difflib
import io
import json
import os
import warnings
from typing import NamedTuple

import torch

from common.checkpoint_io import load_checkpoint
from common.download import download
from common.errors import ArgumentError, UserError
from common.files import sha256_file

# The weights of the TensorFlow graph of 2015-12-05 that FID is defined by, as torch-fidelity converted them.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
MAX_PIXEL_FEATURES = 32 * 32 * 3  # the covariance of these is 3072 x 3072


class Features(NamedTuple):
    """Features of n images, float32: `pool` (n, D), and `spatial` (n, S) if the space has a second set."""

    pool: torch.Tensor
    spatial: torch.Tensor | None = None


class FeatureSpace:
    """Base class of feature spaces: callables from images (n, H, W, 3) uint8 to `Features`, with `metadata()`.

    Attributes:
        is_standard (bool): Whether distances in this space may be called FID.
        class_logits (callable): pool features -> logits of the Inception Score; None if the space has none.
        predict_class (callable): pool features (n, D) -> predicted classes (n,); None if the space has no classes.
        num_classes (int): Number of classes that `predict_class` distinguishes.
    """

    is_standard = False
    class_logits = None
    predict_class = None
    num_classes = None


class InceptionFeatures(FeatureSpace):
    """Features of the Inception network by which FID, sFID, IS, precision and recall are published (ADM's suite).

    Images are resized to 299 x 299 as TensorFlow 1 does (bilinear, no half-pixel centers, no antialiasing). `pool` is
    the output of `pool_3`, 2048 numbers; `spatial` the first 7 channels of `mixed_6/conv`, 17 x 17 x 7 = 2023 numbers
    in the order height, width, channel (sFID: Nash et al., 2021, arXiv 2103.03841). The network is torch-fidelity's.

    The weights are those of the file `inception`, by default the standard ones, downloaded if absent.

    Raises:
        UserError: If the weights cannot be fetched or read, or do not fit torch-fidelity's network.
    """

    SPATIAL_CHANNELS = 7

    def __init__(self, device, inception=None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = inception or fetch_inception()
        state = load_checkpoint(path)
        self.sha256 = sha256_file(path)
        if os.path.basename(path) == INCEPTION_FILE and not self.is_standard:
            raise ArgumentError(f"the file of this name has the SHA-256 {INCEPTION_SHA256}, not {self.sha256}: it is "
                                "damaged or was changed. Download it again, or rename it", inception=path)
        self.device = device
        # torch-fidelity unpickles its file in a way that could run code: it gets the loaded tensors, saved again.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], buffer)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not hold the weights of torch-fidelity's Inception "
                            f"({_first_line(error)})") from None
        self.network = network.to(device)
        # TensorFlow's mixed_6 is torchvision's Mixed_6d; its first convolution is the 1 x 1 branch, after ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_mixed_6)

    @property
    def is_standard(self):
        """Whether the weights are those that FID is defined by."""
        return self.sha256 == INCEPTION_SHA256

    def metadata(self):
        """Describe the features, as a dict of plain values."""
        return dict(space="inception-2015-12-05" if self.is_standard else "inception with other weights",
                    weights_sha256=self.sha256, resize="299 x 299, bilinear as TensorFlow 1", precision="fp32",
                    pool="pool_3", spatial="mixed_6/conv, 7 channels")

    def _keep_mixed_6(self, module, inputs, output):
        self.mixed_6 = output[:, :self.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images):
        """Compute the `Features` of images, shape (n, H, W, 3), uint8."""
        with full_precision():
            (pool,) = self.network(images.to(self.device).permute(0, 3, 1, 2))
        return Features(pool, self.mixed_6)

    def class_logits(self, pool):
        """Compute the logits of the Inception Score, shape (n, 1008): `pool` times the output weights, no bias."""
        return pool @ self.network.fc.weight.T.to(pool.device)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fetch_inception():
    """Return the path of Inception's standard weights, downloading them if they are absent."""
    try:
        return download(INCEPTION_FILE, base_url=INCEPTION_URL, sha256=INCEPTION_SHA256)
    except UserError as error:
        raise UserError(f"{error} (its SHA-256 is {INCEPTION_SHA256}). The feature space `pixels` needs no weights; "
                        "it is for images up to 32 x 32") from None


class PixelFeatures(FeatureSpace):
    """Flattened pixels in [0, 1], for images up to 32 x 32, which Inception does not suit."""

    def __init__(self, device):
        self.device = device

    def metadata(self):
        """Describe the features, as a dict of plain values."""
        return dict(space="pixels", range="0 .. 1")

    def __call__(self, images):
        """Compute the `Features` of images, shape (n, H, W, 3), uint8."""
        if images[0].numel() > MAX_PIXEL_FEATURES:
            raise ArgumentError(f"images of {images.shape[2]} x {images.shape[1]} pixels are too large, 32 x 32 is the "
                                "maximum. Use inception", features="pixels")
        return Features(images.to(self.device).flatten(1).float() / 255)


class ModuleFeatures(FeatureSpace):
    """Features by a TorchScript module (`torch.jit.save`) from (n, 3, H, W) uint8 to (n, D).

    One of `evaluation.classifier.save_classifier` predicts classes too. A module is a program: run trusted ones only.
    """

    CLASSIFIER_METADATA = "classifier.json"  # the file inside the module that `save_classifier` adds

    def __init__(self, device, features):
        extra_files = {self.CLASSIFIER_METADATA: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch recommends torch.export
                self.module = torch.jit.load(features, map_location=device, _extra_files=extra_files).eval()
        except (RuntimeError, ValueError) as error:
            raise ArgumentError(f"not a TorchScript module ({_first_line(error)})", features=features) from None
        self.device, self.path, self.sha256 = device, features, sha256_file(features)
        self.classifier = json.loads(extra_files[self.CLASSIFIER_METADATA] or "null")
        if self.classifier:
            self.predict_class = self._predict_class
            self.num_classes = len(self.classifier["class_names"])

    def metadata(self):
        """Describe the features, as a dict of plain values."""
        if self.classifier:
            return dict(space=f"a classifier of {self.classifier['data']}", module_sha256=self.sha256,
                        precision="fp32", accuracy=self.classifier["accuracy"])
        return dict(space=f"module {os.path.basename(self.path)}", module_sha256=self.sha256, precision="fp32")

    @torch.no_grad()
    def _predict_class(self, pool):
        with full_precision():
            return self.module.class_logits(pool.to(self.device)).argmax(dim=1).cpu()

    @torch.no_grad()
    def __call__(self, images):
        """Compute the `Features` of images, shape (n, H, W, 3), uint8."""
        try:
            with full_precision():
                pool = self.module(images.to(self.device).permute(0, 3, 1, 2).contiguous())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArgumentError(f"the module fails on images of shape {tuple(images.shape)} ({reason})",
                                features=self.path) from None
        if not torch.is_tensor(pool) or pool.dim() != 2 or len(pool) != len(images):
            result = tuple(pool.shape) if torch.is_tensor(pool) else type(pool).__name__
            raise ArgumentError(f"the module returns {result} for {len(images)} images, not ({len(images)}, D)",
                                features=self.path)
        return Features(pool.float())


def load_feature_space(features, device, inception=None):
    """Return the `FeatureSpace` "inception", "pixels", or of the path of a TorchScript module, on a device.

    Raises:
        ArgumentError: If the name is unknown, or `inception`, a file of its weights, is passed for another space.
    """
    if inception and features != "inception":
        raise ArgumentError(f"these weights are for the features inception, not {features}", inception=inception)
    if features == "inception":
        return InceptionFeatures(device, inception)
    if features == "pixels":
        return PixelFeatures(device)
    if not os.path.isfile(features):
        near = difflib.get_close_matches(features.lower(), ("inception", "pixels"), n=1)
        raise ArgumentError("neither inception, nor pixels, nor the file of a TorchScript module"
                            + "".join(f". Did you mean {name}?" for name in near), features=features)
    return ModuleFeatures(device, features)


@contextlib.contextmanager
def full_precision():
    """Compute float32 in float32 on GPUs too inside the block: features are defined without TF32."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
