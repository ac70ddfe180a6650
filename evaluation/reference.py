"""References that samples are compared with: statistics files of ADM and of `save_reference`, or images."""
import contextlib
import json
import os

import numpy as np
import torch

from common import distributed
from common.errors import ArgumentError, UserError
from common.files import atomic_write, read_npz_array, sha256_file
from evaluation.feature_statistics import FeatureStatistics, compute_statistics
from evaluation.file_kinds import Purpose, list_arrays
from evaluation.image_sources import NpzImages, open_image_source

NUM_REFERENCE_FEATURES = 10_000  # kept for precision and recall: as many as the images in ADM's references


def open_reference(reference, features, batch_size, image_size=None, num_classes=None):
    """Open a reference, measuring its images if need be. Call it on all ranks.

    It is ADM's .npz (`mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`), a file of `save_reference`, or images that
    `open_image_source` takes with `image_size` and `num_classes`.

    Returns:
        tuple[FeatureStatistics, dict]: The statistics and their metadata.

    Raises:
        ArgumentError: If the file is of another feature space.
        UserError: If the file is damaged.
    """
    statistics = images = None
    with distributed.raise_on_all_ranks():
        purpose = Purpose(is_reference=True, space=features.metadata())
        names = list_arrays(reference, purpose) if os.path.isfile(reference) else {}
        if "mu" in names:
            statistics, metadata = _read_statistics(reference, names, features)
            if statistics.features is None and "arr_0" in names:
                images = NpzImages(reference)  # ADM's: the images for precision and recall, not those of `mu`
        else:
            images = open_image_source(reference, image_size, num_classes)
    if images is None:
        return statistics, metadata
    measured = compute_statistics(images, features, batch_size, keep=NUM_REFERENCE_FEATURES, title="reference")
    if statistics is None:
        return measured, measured.describe(images)
    statistics.features, statistics.size = measured.features, measured.size
    return statistics, metadata


def _read_statistics(path, names, features):
    """Return the `FeatureStatistics` of a file of statistics, and its metadata."""
    metadata = dict(path=os.path.abspath(path), sha256=sha256_file(path))
    if "record" in names:
        metadata |= _read_record(path, features.metadata())
    elif "spatial" not in features.metadata():  # ADM's files have no record; they are of standard Inception
        raise ArgumentError("the file holds statistics of Inception features, but the feature space is "
                            f"{features.metadata()['space']}", reference=path)
    statistics = FeatureStatistics(metadata.get("images"), _read_gaussian(path, "mu", "sigma"),
                                   _read_gaussian(path, "mu_s", "sigma_s") if "mu_s" in names else None,
                                   size=metadata.pop("size", None))
    if "features" in names:
        rows, dimensions = _read_finite(path, "features"), len(statistics.pool[0])
        if rows.ndim != 2 or rows.shape[1] != dimensions:
            raise UserError(f"{path}: mu has {dimensions} numbers, but features has shape {rows.shape}")
        statistics.features = torch.from_numpy(rows.astype("float32"))
    return statistics, metadata


def _read_record(path, expected_space=None):
    """Return the record of `save_reference`; raise an error if its feature space is not the expected one."""
    try:
        record = json.loads(read_npz_array(path, "record").tobytes())
        space, source = record["features"], record["source"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path}: its record cannot be read") from None
    if expected_space not in (None, space):
        raise ArgumentError(f"the file was made in another feature space ({_format_space(space)}) than "
                            f"{_format_space(expected_space)}", reference=path)
    size = record.get("size")
    return dict(images=record.get("images"), size=tuple(size) if isinstance(size, list) else None, source=source)


def _format_space(space):
    return ", ".join(str(value)[:20] for value in space.values()) if isinstance(space, dict) else space


def _read_gaussian(path, mean_name, covariance_name):
    mean, covariance = _read_finite(path, mean_name), _read_finite(path, covariance_name)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: {mean_name} and {covariance_name} have the shapes {mean.shape} and "
                        f"{covariance.shape}, not (D,) and (D, D)")
    if (covariance.diagonal() < 0).any() or not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-8):
        raise UserError(f"{path}: {covariance_name} is not a covariance: not symmetric, or negative on its diagonal")
    return mean, covariance


def _read_finite(path, name):
    array = np.asarray(read_npz_array(path, name))
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path}: {name} does not consist of finite numbers")
    return array


def check_overwrite(path, images):
    """Raise an `ArgumentError` if a file is there, unless it is an earlier reference of the same images."""
    if not os.path.exists(path):
        return
    with contextlib.suppress(UserError, LookupError, TypeError):
        if _read_record(path)["source"]["path"] == images.metadata()["path"]:
            return
    raise ArgumentError("this file exists, and is not a reference of the same images. Choose another name, or pass "
                        "--overwrite", output=path)


def save_reference(path, statistics, features, source):
    """Write `FeatureStatistics` as a reference: ADM's arrays, the features for precision and recall, and a record.

    The record describes the feature space and, by the plain values of `source`, the images.
    """
    arrays = dict(mu=statistics.pool[0], sigma=statistics.pool[1], features=statistics.features.numpy())
    if statistics.spatial is not None:
        arrays |= dict(mu_s=statistics.spatial[0], sigma_s=statistics.spatial[1])
    record = dict(features=features.metadata(), images=statistics.count, size=statistics.size, source=source)
    with atomic_write(path) as file:
        np.savez(file, record=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8), **arrays)
