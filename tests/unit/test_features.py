"""Feature spaces: Inception against an independent implementation, its resizing against TensorFlow 1's rule."""
import hashlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import inception

from common.errors import UserError
from evaluation.features import INCEPTION_SHA256, InceptionFeatures, load_feature_space
from helpers import raises_argument
from run_files import picture
from tiny_models import random_inception

CPU = torch.device("cpu")


class TensorFlowFunctions:
    """torch.nn.functional with the pooling of the graph of 2015: borders are left out of means, and the last block
    takes the maximum."""

    last_block = False

    def __getattr__(self, name):
        return getattr(F, name)

    def avg_pool2d(self, x, kernel_size, stride, padding):
        if self.last_block:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)


@pytest.fixture(scope="module")
def features(inception_weights):
    return InceptionFeatures(CPU, inception_weights)


def resized_by_hand(image, size=299):
    """Resize as TensorFlow 1 does, pixel by pixel: bilinear, position i * (in / out), no half-pixel centers."""
    height, width = image.shape[:2]
    out = np.empty((size, size, 3))
    for row in range(size):
        y = row * height / size
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for column in range(size):
            x = column * width / size
            left, right = int(x), min(int(x) + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[row, column] = upper + (lower - upper) * (y - top)
    return out


def seen_by(features, images):
    seen = []
    handle = features.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shape", [(5, 7), (320, 301)])
def test_images_are_resized_as_tensorflow_did(features, shape):
    image = picture(*shape, 3).astype(float)
    found = seen_by(features, torch.from_numpy(image.astype(np.uint8))[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, (resized_by_hand(image) - 128) / 128, atol=1e-4)
    other = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], (299, 299), mode="bilinear")[0]
    assert np.abs(found - (other.permute(1, 2, 0).numpy() - 128) / 128).max() > 0.01


def test_features_and_logits_agree_with_an_independent_inception(features, monkeypatch):
    """mixed_6/conv in the order height, width, channel; the logits without bias."""
    images, independent = torch.from_numpy(np.stack([picture(64, 48, 3, seed=i) for i in range(2)])), random_inception()
    found = features(images)
    assert found.pool.shape == (2, 2048) and found.spatial.shape == (2, 17 * 17 * 7)
    functions, kept = TensorFlowFunctions(), {}
    monkeypatch.setattr(inception, "F", functions)
    independent.Mixed_7c.register_forward_pre_hook(lambda *_: setattr(functions, "last_block", True))
    independent.Mixed_6d.branch1x1.register_forward_hook(lambda *args: kept.update(mixed_6=args[2]))
    independent.avgpool.register_forward_hook(lambda *args: kept.update(pool=args[2].flatten(1)))
    with torch.no_grad():
        logits = independent(seen_by(features, images))

    def error(one, two):
        return ((one - two).abs().max() / two.abs().max()).item()

    assert error(found.pool, kept["pool"]) < 1e-5 and kept["pool"].std() > 1e-3
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 16, 6), (3, 5, 2)):
        assert abs(found.spatial[1, (h * 17 + w) * 7 + c] - kept["mixed_6"][1, c, h, w]) < 1e-5 * kept["mixed_6"].max()
    want = kept["mixed_6"][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert error(found.spatial, want) < 1e-5 and want.std() > 1e-3
    assert error(features.class_logits(found.pool), logits - independent.fc.bias) < 1e-5
    assert independent.fc.bias.abs().max() > 0


def test_features_do_not_depend_on_the_batch(features):
    images = torch.from_numpy(np.stack([picture(32, 32, 3, seed=seed) for seed in range(3)]))
    batch, singles = features(images), [features(image[None]) for image in images]
    for rows, parts in zip(batch, zip(*singles)):
        torch.testing.assert_close(rows, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_features_are_never_in_tf32(features, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    seen = []
    hook = features.network.Conv2d_1a_3x3.register_forward_hook(lambda *_: seen.append(
        (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)))
    try:
        features(torch.from_numpy(picture(1, 8, 8, 3)))
        assert seen == [("highest", False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_distances_by_other_weights_are_not_called_fid(features, inception_weights):
    assert features.sha256 == hashlib.sha256(Path(inception_weights).read_bytes()).hexdigest() != INCEPTION_SHA256
    assert not features.is_standard and features.metadata()["space"] == "inception with other weights"


@pytest.mark.parametrize("content", [dict(a=torch.zeros(3)), torch.zeros(3), types.SimpleNamespace(a=1)])
def test_files_without_inception_weights_are_refused(tmp_path, content):
    path = str(tmp_path / "w.pth")
    torch.save(content, path)
    with pytest.raises(UserError, match=path):
        InceptionFeatures(CPU, path)


def test_weights_that_cannot_be_fetched_are_named_with_address_and_path(monkeypatch, tmp_path):
    import evaluation.features
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation.features, "INCEPTION_URL", "http://127.0.0.1:9/v0.2.0/")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v0\.2\.0/weights-inception.*"
                                        rf"{tmp_path}/pretrained_models/weights-inception-2015-12-05-6726825d\.pth"):
        load_feature_space("inception", CPU)


def test_downloaded_weights_with_another_sha256_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match=INCEPTION_SHA256):
        load_feature_space("inception", CPU)


def test_pixel_features_are_flattened_pixels():
    images = torch.from_numpy(picture(2, 4, 5, 3))
    found = load_feature_space("pixels", CPU)(images)
    assert found.spatial is None and torch.equal(found.pool, images.flatten(1) / 255)
    with raises_argument(features="pixels"):
        load_feature_space("pixels", CPU)(torch.zeros(1, 33, 64, 3, dtype=torch.uint8))


class MeanColor(torch.nn.Module):
    def forward(self, images):
        return images.double().mean(dim=(2, 3))


class ReturnsImages(torch.nn.Module):
    def forward(self, images):
        return images.float()


class Fails(torch.nn.Module):
    def forward(self, images):
        return images.float() @ torch.zeros(3, 3)


def save_module(module, tmp_path):
    path = str(tmp_path / f"{type(module).__name__}.pt")
    torch.jit.save(torch.jit.script(module), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_module_features_are_those_of_the_module(tmp_path):
    images = torch.from_numpy(picture(2, 4, 5, 3))
    features = load_feature_space(save_module(MeanColor(), tmp_path), CPU)
    assert torch.equal(features(images).pool, images.double().mean(dim=(1, 2)).float())
    assert features.metadata()["space"] == "module MeanColor.pt" and not features.is_standard


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("module, problem", [(ReturnsImages(), r"\(2, 3, 4, 5\)"), (Fails(), r"\(2, 4, 5, 3\)")])
def test_modules_that_return_no_features_are_refused(tmp_path, module, problem):
    path = save_module(module, tmp_path)
    with raises_argument(problem, features=path):
        load_feature_space(path, CPU)(torch.from_numpy(picture(2, 4, 5, 3)))


def test_unknown_feature_spaces_are_refused(tmp_path):
    damaged = tmp_path / "x.pt"
    damaged.write_bytes(b"x")
    for arguments, named in ((("nothing", CPU), dict(features="nothing")),
                             ((str(damaged), CPU), dict(features=str(damaged))),
                             (("pixels", CPU, "w"), dict(inception="w"))):
        with raises_argument(**named):
            load_feature_space(*arguments)
