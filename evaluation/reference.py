"""What samples are compared with: statistics files of ADM and of our own, or images."""

import json
import os

import numpy as np
import torch

from common import distributed
from common.errors import UserError
from common.files import atomic_write, list_npz_arrays, read_npz_array, sha256_file
from evaluation.feature_statistics import FeatureStatistics, compute_statistics
from evaluation.image_sources import NpzImages, open_image_source

PRECISION_IMAGES = 10_000  # of a reference, for precision and recall: as many as ADM's references hold


def open_reference(path, features, batch_size, image_size=None, num_classes=None):
    """(`FeatureStatistics`, record) of what --reference names: ADM's .npz (`mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`), an .npz
    of images, a folder, an embedded data set (`digits-held-out`), or a file of `save_reference`.

    image_size, num_classes  as `open_image_source` takes them
    raise  UserError for a file that is damaged, or of another feature space. To be called by all processes.
    """
    with distributed.raise_on_all_ranks():
        names = list_npz_arrays(path) if os.path.isfile(path) else set()
        images = None
        if "mu" not in names:
            images = open_image_source(path, image_size, num_classes)
        else:
            reference, record = _read(path, names, features)
            if reference.features is None and "arr_0" in names:
                images = NpzImages(path)  # ADM's: beside statistics of the training set, for precision and recall
    if images is None:
        return reference, record
    found = compute_statistics(images, features, batch_size, keep=PRECISION_IMAGES, title="reference")
    if "mu" in names:
        reference.features, reference.size = found.features, found.size
        return reference, record
    return found, images.metadata() | (dict(pixels_sha256=found.pixels) if found.pixels else {})


def _read(path, names, features):
    """(`FeatureStatistics`, record) of a file of statistics."""
    record = dict(path=os.path.abspath(path), sha256=sha256_file(path)) | _own_record(path, names, features)
    reference = FeatureStatistics(record.get("images"), _statistics(path, "mu", "sigma"),
                         _statistics(path, "mu_s", "sigma_s") if "mu_s" in names else None,
                         size=record.pop("size", None))
    if "features" in names:
        rows = _finite(path, "features")
        if rows.ndim != 2 or rows.shape[1] != len(reference.pool[0]):
            raise UserError(f"--reference {path}: mu has {len(reference.pool[0])} numbers, features has the shape "
                            f"{rows.shape}")
        reference.features = torch.from_numpy(rows.astype("float32"))
    return reference, record


def _own_record(path, names, features):
    """What a file of ours says of itself; ADM's files say nothing, and are of the standard Inception network."""
    if "record" not in names:
        if "spatial" not in features.metadata():
            raise UserError(f"--reference {path} holds statistics of Inception features, --features is "
                            f"{features.metadata()['space']}")
        return {}
    try:
        record = json.loads(read_npz_array(path, "record").tobytes())
        space, source = record["features"], record["source"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"--reference {path}: its record cannot be read") from None
    if space != features.metadata():
        raise UserError(f"--reference {path} was made in another feature space ({_short(space)}) than --features says "
                        f"({_short(features.metadata())})")
    size = record.get("size")
    return dict(images=record.get("images"), size=tuple(size) if isinstance(size, list) else None, source=source)


def _statistics(path, mean_name, covariance_name):
    mean, covariance = _finite(path, mean_name), _finite(path, covariance_name)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"--reference {path}: {mean_name} and {covariance_name} have the shapes {mean.shape} and "
                        f"{covariance.shape}, not (D,) and (D, D)")
    if (covariance.diagonal() < 0).any() or not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-8):
        raise UserError(f"--reference {path}: {covariance_name} is no covariance, which is symmetric and has no "
                        "negative diagonal")
    return mean, covariance


def _finite(path, name):
    array = np.asarray(read_npz_array(path, name))
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"--reference {path}: {name} does not consist of finite numbers")
    return array


def _short(space):
    return ", ".join(str(value)[:20] for value in space.values()) if isinstance(space, dict) else space


def save_reference(path, reference, features, source):
    """Write a `FeatureStatistics` set as a reference: ADM's arrays, the features for precision and recall, and a record.

    source  what the images are, a plain dictionary
    """
    spatial = {} if reference.spatial is None else dict(mu_s=reference.spatial[0], sigma_s=reference.spatial[1])
    record = json.dumps(dict(features=features.metadata(), images=reference.count, size=reference.size, source=source))
    with atomic_write(path) as file:
        np.savez(file, mu=reference.pool[0], sigma=reference.pool[1], features=reference.features.numpy(),
                 record=np.frombuffer(record.encode(), dtype=np.uint8), **spatial)
