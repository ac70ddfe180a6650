"""Mean, covariance and features of a set of images in a feature space, computed by any number of ranks."""
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from common import distributed
from common.errors import ArgumentError, UserError
from data.dataset import evenly_spaced_indices
from evaluation.image_sources import GenerationInterrupted
from evaluation.metrics import float64_device


@dataclass
class FeatureStatistics:
    """Statistics of a set of images in a feature space.

    Attributes:
        count (int): Number of images; None if a reference file does not say.
        pool (tuple[ndarray, ndarray]): Mean (D,) and covariance (D, D) of the features.
        spatial (tuple[ndarray, ndarray]): The same of the second set of features, or None.
        features (Tensor): Features of all images or of some, in their order, shape (n, D), float32; on rank 0 only.
        size (tuple[int, int]): Height and width of the first image, or None if unknown.
        pixels_sha256 (str): Hash of all pixels in their order, or None if not requested.
    """

    count: int | None
    pool: tuple
    spatial: tuple | None = None
    features: torch.Tensor | None = None
    size: tuple | None = None
    pixels_sha256: str | None = None

    def describe(self, images):
        """Return the metadata of the `images` that were measured, with the hash of their pixels if there is one."""
        return images.metadata() | (dict(pixels_sha256=self.pixels_sha256) if self.pixels_sha256 else {})


class LocalStatistics:
    """Statistics of the images of one rank.

    The features of the images with `kept_indices`, counted in the full set, are kept; pixels are hashed if `hashes`.
    """

    def __init__(self, features, kept_indices, hashes):
        self.features, self.kept_indices, self.hashes = features, np.array(kept_indices), hashes
        self.moments = {}  # name of a field of `Features`: RunningMoments
        self.kept_features = []
        self.pixel_hash, self.size = 0, None

    def add(self, start, images):
        """Add consecutive images, shape (n, H, W, 3), uint8; the first has the index `start` in the full set.

        Raises:
            ArgumentError: If the batch does not fit into memory.
            UserError: If the features are not finite, or their number changes.
        """
        self.size = self.size or tuple(images.shape[1:3])
        try:
            features = self.features(images)
        except torch.OutOfMemoryError:
            raise ArgumentError("the features of so large a batch do not fit into memory. Lower it",
                                batch_size=len(images)) from None
        for name, rows in features._asdict().items():
            if rows is not None:
                self._add_rows(name, rows, start)
        kept = self.kept_indices[(self.kept_indices >= start) & (self.kept_indices < start + len(images))] - start
        self.kept_features.append(features.pool[torch.from_numpy(kept).to(features.pool.device)].cpu())
        if self.hashes:  # a sum does not depend on how the images are split over ranks
            for index, image in enumerate(images.cpu().numpy(), start=start):
                digest = hashlib.sha256(index.to_bytes(8, "little") + image.tobytes()).digest()
                self.pixel_hash = (self.pixel_hash + int.from_bytes(digest, "little")) % 2**256

    def _add_rows(self, name, rows, start):
        moments = self.moments.setdefault(name, RunningMoments(rows.shape[1], rows.device))
        if not rows.shape[1] or rows.shape[1] != len(moments.mean):
            raise UserError(f"the feature space returns {rows.shape[1]} numbers an image, before {len(moments.mean)}")
        if not torch.isfinite(rows).all():
            raise UserError(f"the features of the images {start} .. {start + len(rows) - 1} are not finite")
        moments.add(rows)


def compute_statistics(images, features, batch_size, keep=None, title="images", stopped=lambda: False):
    """Stream an `ImageSource` through a feature space. Every rank takes a contiguous part; call it on all ranks.

    The features of at most `keep` images, evenly spaced, are kept; by default of all. `stopped` is called before every
    batch: whether to give up. If one rank does, all do.

    Returns:
        FeatureStatistics: The same on every rank; None if the ranks gave up.

    Raises:
        UserError: On all ranks, if anything fails on one of them.
    """
    rank, world_size, count = distributed.rank(), distributed.world_size(), len(images)
    start, end = (count * i // world_size for i in (rank, rank + 1))
    largest_part = -(-count // world_size)
    local = LocalStatistics(features, evenly_spaced_indices(count, min(count, keep or count)), images.hashes)
    reducer, error, gave_up = distributed.AsyncFlagReducer(), None, False
    with distributed.raise_on_all_ranks(), tqdm(total=end - start, unit="image", desc=title, leave=False,
                                               disable=not distributed.is_rank0() or None) as bar:
        for batch_start in range(start, start + largest_part, batch_size):
            gave_up, failed = reducer.exchange(stopped(), error)
            if gave_up or failed:
                break
            batch_end = min(batch_start + batch_size, end)
            if error is None and batch_start < batch_end:
                try:
                    local.add(batch_start, images.batch(batch_start, batch_end))
                except GenerationInterrupted:
                    continue  # `stopped` is still true before the next batch
                except Exception as caught:  # raised on all ranks together: the others must not wait for this one
                    error = caught
                bar.update(batch_end - batch_start)
        if error is not None:
            raise error
    return None if gave_up else _combine(local, count)


def _combine(local, count):
    """Return the `FeatureStatistics` of all ranks; None if images are missing."""
    dimensions = {name: len(moment.mean) for name, moment in local.moments.items()}
    parts = distributed.gather_objects([(dimensions, local.size, local.pixel_hash)])
    dimensions = {name: width for part, _, _ in parts for name, width in part.items()}
    size = next((size for _, size, _ in parts if size), None)
    pixel_hash = sum(part_hash for _, _, part_hash in parts) % 2**256
    # A rank without images takes part with zeros.
    moments = {name: (local.moments.get(name) or RunningMoments(width, distributed.device())).reduce()
               for name, width in sorted(dimensions.items())}
    if not moments or any(moment.count != count for moment in moments.values()):
        return None  # a rank gave up in its last batch
    statistics = {name: moment.statistics() for name, moment in moments.items()}
    return FeatureStatistics(count, features=_gather_rows(local.kept_features), size=size,
                             pixels_sha256=f"{pixel_hash:064x}" if local.hashes else None, **statistics)


def _gather_rows(batches):
    """Concatenate the feature rows of all ranks, in their order, on rank 0; None on the others."""
    rows = torch.cat(batches) if batches else torch.zeros(0, 0)
    if distributed.world_size() == 1:
        return rows
    shapes = distributed.gather_objects([tuple(rows.shape)])
    padded = torch.zeros(*map(max, zip(*shapes)), device=distributed.device())
    padded[: len(rows), : rows.shape[1]] = rows
    gathered = distributed.all_gather(padded[None]).cpu()
    if not distributed.is_rank0():
        return None
    return torch.cat([part[:count] for part, (count, _) in zip(gathered, shapes)])


class RunningMoments:
    """Mean and covariance of rows (n, D) in float64, added in any batches by any number of ranks.

    Sums are kept about the running mean (Chan et al., 1979), so that features with a large mean lose no digits; on the
    CPU instead of a device without float64.
    """

    def __init__(self, dimensions, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=float64_device(device))
        self.scatter = self.mean.new_zeros(dimensions, dimensions)

    def add(self, rows):
        """Add features (Tensor), shape (n, D)."""
        rows = rows.to(self.mean.device).double()
        mean = rows.mean(dim=0)
        centered = rows - mean
        count = self.count + len(rows)
        shift = mean - self.mean
        self.scatter += centered.T @ centered + torch.outer(shift, shift) * (self.count * len(rows) / count)
        self.mean += shift * (len(rows) / count)
        self.count = count

    def reduce(self):
        """Combine the moments of all ranks, on every rank. Returns self."""
        if distributed.world_size() == 1:
            return self
        device = distributed.device()  # the backend may not reduce on the device of the moments
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]).to(device)
        sums = distributed.all_reduce_sum(sums).to(self.mean.device)
        count = int(sums[-1])
        mean = sums[:-1] / max(1, count)
        shift = self.mean - mean
        scatter = self.scatter + torch.outer(shift, shift) * self.count
        self.scatter = distributed.all_reduce_sum(scatter.to(device)).to(self.mean.device)
        self.mean, self.count = mean, count
        return self

    def statistics(self):
        """Return mean (D,) and covariance (D, D) as arrays; the covariance divides by N - 1, as `np.cov` does."""
        return self.mean.cpu().numpy(), (self.scatter / max(1, self.count - 1)).cpu().numpy()
