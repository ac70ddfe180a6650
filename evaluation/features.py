"""Feature spaces in which sets of images are compared."""

import contextlib
import io
import json
import os
import warnings
from typing import NamedTuple

import torch

from common.checkpoint_io import load_checkpoint
from common.download import download
from common.errors import UserError
from common.files import sha256_file

# The weights of the TensorFlow graph of 2015-12-05 that FID is defined by, as torch-fidelity converted them.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LARGEST_PIXELS = 32 * 32 * 3  # numbers an image of the pixel space: a covariance of 3072 x 3072


class Features(NamedTuple):
    """What a feature space answers for n images.

    pool     (n, D) float32, on the device
    spatial  (n, S) float32, or None where the space has no second set of features
    """
    pool: torch.Tensor
    spatial: torch.Tensor = None


class FeatureSpace:
    """What a feature space is, beside being called: (n, H, W, 3) uint8 -> `Features`.

    is_standard          whether distances in it may be called FID
    class_logits(pool)   what the Inception Score is of; None: there is none in this space
    predicted(pool)      the class that each image is taken for, (n,); None: it knows no classes
    record()             what the features are; plain values
    """

    is_standard, class_logits, predicted, num_classes = False, None, None, None


class InceptionFeatures(FeatureSpace):
    """The Inception network that FID, sFID, Inception Score, precision and recall are published with (ADM's suite).

    Images are scaled to 299 x 299 as TensorFlow 1 scales (bilinear, no half-pixel centres, no antialiasing). pool: the
    2048 numbers of `pool_3`. spatial: the first 7 channels of `mixed_6/conv`, 17 x 17 x 7 = 2023 numbers in the order
    height, width, channel (sFID: Nash et al., 2021, arXiv 2103.03841). The network is torch-fidelity's port.

    weights  a file of the port's weights; None: the usual one, downloaded to `pretrained_models/` if need be
    raise    UserError where there are none, or they are other weights than the port's
    """

    SPATIAL_CHANNELS = 7

    def __init__(self, device, weights=None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = weights or downloaded_inception()
        state = load_checkpoint(path)
        self.sha256 = sha256_file(path)
        self.device = device
        # torch-fidelity unpickles its file in a way that could run code; what it gets here are tensors, saved again.
        raw = io.BytesIO()
        torch.save(state, raw)
        raw.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], raw)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{path} does not hold the weights of torch-fidelity's Inception ({reason})") from None
        self.network = network.to(device)
        # TensorFlow's mixed_6 is torchvision's Mixed_6d, and its first convolution is the branch of 1 x 1, after ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @property
    def is_standard(self):
        """Whether distances in this space may be called FID."""
        return self.sha256 == INCEPTION_SHA256

    def metadata(self):
        """What these features are; plain values."""
        return dict(space="inception-2015-12-05" if self.is_standard else "inception with other weights",
                    weights_sha256=self.sha256, resize="299 x 299, bilinear as TensorFlow 1", precision="fp32",
                    pool="pool_3", spatial="mixed_6/conv, 7 channels")

    def _keep(self, module, inputs, output):
        self.mixed_6 = output[:, :self.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images):
        """(n, H, W, 3) uint8 -> `Features`."""
        with full_precision():
            (pool,) = self.network(images.to(self.device).permute(0, 3, 1, 2))
        return Features(pool, self.mixed_6)

    def class_logits(self, pool):
        """(n, 2048) -> (n, 1008): pool_3 times the output weights, without bias, as the Inception Score takes them."""
        return pool @ self.network.fc.weight.T.to(pool.device)


def downloaded_inception():
    """The path of the usual weights. raise: UserError where they are not there and cannot be fetched."""
    try:
        return download(INCEPTION_FILE, base_url=INCEPTION_URL, sha256=INCEPTION_SHA256)
    except UserError as error:
        raise UserError(f"{error} (its SHA-256 is {INCEPTION_SHA256}). For images up to 32 x 32 there is --features "
                        "pixels, which needs no weights") from None


class PixelFeatures(FeatureSpace):
    """Flattened pixels in [0, 1], for images that Inception does not suit: up to 32 x 32."""

    def __init__(self, device):
        self.device = device

    def metadata(self):
        return dict(space="pixels", range="0 .. 1")

    def __call__(self, images):
        """(n, H, W, 3) uint8 -> `Features`. raise: UserError where they are too large."""
        if images[0].numel() > LARGEST_PIXELS:
            raise UserError(f"--features pixels: images of {images.shape[2]} x {images.shape[1]} pixels are too large, "
                            "32 x 32 is the most; take --features inception")
        return Features(images.to(self.device).flatten(1).float() / 255)


class ModuleFeatures(FeatureSpace):
    """What a TorchScript module (`torch.jit.save`) makes of (n, 3, H, W) uint8 images: (n, D) numbers.

    One of `evaluation.classifier` knows classes, too. A module is a program: it is run, so take one that you trust.
    """

    ABOUT = "classifier.json"  # what `evaluation.classifier` keeps inside its file

    def __init__(self, device, path):
        extra = {self.ABOUT: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch, which wants everybody to export instead
                self.module = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"--features {path}: this is no TorchScript module ({reason})") from None
        self.device, self.sha256, self.name = device, sha256_file(path), os.path.basename(path)
        self.about = json.loads(extra[self.ABOUT] or "null")
        if self.about:
            self.predicted, self.num_classes = self._predicted, len(self.about["class_names"])

    def metadata(self):
        """What these features are; plain values."""
        if not self.about:
            return dict(space=f"module {self.name}", module_sha256=self.sha256, precision="fp32")
        return dict(space=f"a classifier of {self.about['data']}", module_sha256=self.sha256, precision="fp32",
                    accuracy=self.about["accuracy"])

    @torch.no_grad()
    def _predicted(self, pool):
        """(n, D) features -> (n,) classes"""
        with full_precision():
            return self.module.class_logits(pool.to(self.device)).argmax(dim=1).cpu()

    @torch.no_grad()
    def __call__(self, images):
        """(n, H, W, 3) uint8 -> `Features`. raise: UserError where the module does not do as it should."""
        try:
            with full_precision():
                pool = self.module(images.to(self.device).permute(0, 3, 1, 2).contiguous())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--features {self.name}: the module fails on images of the shape "
                            f"{tuple(images.shape)} ({reason})") from None
        if not torch.is_tensor(pool) or pool.dim() != 2 or len(pool) != len(images):
            found = tuple(pool.shape) if torch.is_tensor(pool) else type(pool).__name__
            raise UserError(f"--features {self.name}: the module gives {found} for {len(images)} images, not "
                            f"({len(images)}, D)")
        return Features(pool.float())


def load_feature_space(name, device, inception=None):
    """The feature space that --features names: inception, pixels, or the path of a TorchScript module.

    inception  path of Inception's weights, or None
    """
    if inception and name != "inception":
        raise UserError(f"--inception {inception} is for --features inception, not {name}")
    if name == "inception":
        return InceptionFeatures(device, inception)
    if name == "pixels":
        return PixelFeatures(device)
    if not os.path.isfile(name):
        raise UserError(f"--features {name}: neither inception, nor pixels, nor the file of a TorchScript module")
    return ModuleFeatures(device, name)


@contextlib.contextmanager
def full_precision():
    """A block in which float32 means float32 on GPUs too: features were defined without TF32."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def add_feature_flags(parser):
    """In which feature space sets of images are compared."""
    group = parser.add_argument_group("features")
    group.add_argument("--features", default="inception",
                       help="inception (FID and the rest), pixels (up to 32 x 32), or a TorchScript module's file")
    group.add_argument("--inception", metavar="FILE", help="weights of Inception; default: downloaded once")
    return group
