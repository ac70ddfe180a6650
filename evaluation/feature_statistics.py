"""Mean, covariance and features of a set of images in a feature space, computed by any number of ranks."""
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from common import distributed
from common.errors import UserError
from data.dataset import evenly_spaced_indices
from evaluation.image_sources import GenerationInterrupted


@dataclass
class FeatureStatistics:
    """A set of images in a feature space.

    count     images
    pool      (mean, covariance) of the features
    spatial   the same of the second features, or None
    features  (n, D) float32 of all images, or of some, in their order; on the main process only, or None
    size      (height, width) of the first image, or None where it is not known
    pixels    a hash of all pixels and their order, whatever the batches and processes; None where it was not asked for
    """
    count: int
    pool: tuple
    spatial: tuple = None
    features: torch.Tensor = None
    size: tuple = None
    pixels: str = None


class LocalStatistics:
    """What one process measures of a set: `add` batches, in order."""

    def __init__(self, features, kept, hashes):
        self.features, self.kept, self.hashes = features, np.array(kept), hashes
        self.moments, self.rows, self.pixels, self.size = {}, [], 0, None

    def add(self, first, images):
        """Images (n, H, W, 3) uint8, of which the first has the number `first`. raise: UserError"""
        self.size = self.size or tuple(images.shape[1:3])
        try:
            found = self.features(images)
        except torch.OutOfMemoryError:
            raise UserError(f"the features of {len(images)} images at once do not fit into memory: lower the batch "
                            "size (--per-proc-batch-size)") from None
        for name, rows in found._asdict().items():
            if rows is None:
                continue
            moments = self.moments.setdefault(name, RunningMoments(rows.shape[1], rows.device))
            if not rows.shape[1] or rows.shape[1] != len(moments.mean):
                raise UserError(f"the feature space gives {rows.shape[1]} numbers an image, and {len(moments.mean)} "
                                "before")
            if not torch.isfinite(rows).all():
                raise UserError(f"the features of the images {first} .. {first + len(images) - 1} are not finite")
            moments.add(rows)
        kept = self.kept[(self.kept >= first) & (self.kept < first + len(images))] - first
        self.rows.append(found.pool[torch.from_numpy(kept).to(found.pool.device)].cpu())
        if self.hashes:  # a sum does not depend on who adds what
            for number, image in enumerate(images.cpu().numpy(), start=first):
                digest = hashlib.sha256(number.to_bytes(8, "little") + image.tobytes()).digest()
                self.pixels = (self.pixels + int.from_bytes(digest, "little")) % 2**256


def compute_statistics(images, features, batch_size, keep=None, title="images", stopped=lambda: False):
    """Stream a set through a feature space. Every process takes a contiguous share.

    images   from `evaluation.sources`
    keep     keep the features of at most so many images, at equal distances; None: of all
    title    of the progress bar
    stopped  asked before every batch whether to give up; where one process gives up, all do
    return   `FeatureStatistics` on every process; None where it was given up
    raise    UserError on all processes, for whatever went wrong on one
    """
    rank, world, count = distributed.rank(), distributed.world_size(), len(images)
    first, end = count * rank // world, count * (rank + 1) // world
    rounds = -(-max(count * (i + 1) // world - count * i // world for i in range(world)) // batch_size)
    share = LocalStatistics(features, evenly_spaced_indices(count, min(count, keep or count)), images.hashes)
    watch, error, given_up = distributed.AsyncFlagReducer(), None, False
    with distributed.raise_on_all_ranks(), tqdm(total=end - first, unit="image", desc=title, leave=False,
                                               disable=not distributed.is_rank0() or None) as bar:
        for start in range(first, first + rounds * batch_size, batch_size):
            given_up, failed = watch.exchange(stopped(), error)
            if given_up or failed:
                break
            stop = min(start + batch_size, end)
            if error is None and start < stop:
                try:
                    share.add(start, images.batch(start, stop))
                except GenerationInterrupted:
                    continue  # whoever asked for it still does
                except Exception as caught:  # the others are told at the next batch, and must not wait for this one
                    error = caught
                bar.update(stop - start)
        if error is not None:
            raise error
    return None if given_up else _combined(share, count)


def _combined(share, count):
    """What all processes measured together; None where images are missing."""
    moments, size, pixels = _of_all(share)
    moments = {name: moment.reduce() for name, moment in moments.items()}
    if not moments or any(moment.count != count for moment in moments.values()):
        return None  # given up in the last batch
    statistics = {name: moment.statistics() for name, moment in moments.items()}
    return FeatureStatistics(count, features=_gathered(share.rows), size=size, pixels=pixels, **statistics)


def _of_all(share):
    """The same moments on every process (one that had no image joins in the sums with nothing), the images' size, and
    the pixels' hash.
    """
    sizes, pixels, size = {name: len(moment.mean) for name, moment in share.moments.items()}, share.pixels, share.size
    if distributed.world_size() > 1:
        known = [None] * distributed.world_size()
        torch.distributed.all_gather_object(known, (sizes, size, pixels))
        sizes = {name: width for found, _, _ in known for name, width in found.items()}
        size = next((size for _, size, _ in known if size), None)
        pixels = sum(pixels for _, _, pixels in known) % 2**256
    moments = {name: share.moments.get(name) or RunningMoments(width, distributed.device())
               for name, width in sorted(sizes.items())}
    return moments, size, f"{pixels:064x}" if share.hashes else None


def _gathered(kept):
    """The rows of all processes in their order, on the main process; None on the others."""
    own = torch.cat(kept) if kept else None
    if distributed.world_size() == 1:
        return own
    shapes = [None] * distributed.world_size()
    torch.distributed.all_gather_object(shapes, (0, 0) if own is None else tuple(own.shape))
    most, width = max(rows for rows, _ in shapes), max(width for _, width in shapes)
    padded = torch.zeros(most, width, device=distributed.device())
    if own is not None:
        padded[: len(own)] = own
    everything = distributed.all_gather(padded[None]).cpu()
    if not distributed.is_rank0():
        return None
    return torch.cat([part[:rows] for part, (rows, _) in zip(everything, shapes)])


class RunningMoments:
    """Mean and covariance of rows (n, D), in float64, added in any batches by any number of processes.

    Sums are kept about the running mean (Chan et al., 1979), so that features with a large mean lose no digits.
    """

    def __init__(self, dimensions, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, rows):
        """Add features (n, D)."""
        rows = rows.to(self.mean.device).double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def _merge(self, count, mean, scatter):
        total, shift = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def reduce(self):
        """Become those of all processes' rows, on every process; returns self."""
        if distributed.world_size() == 1:
            return self
        device = distributed.device()  # where the processes can talk to each other
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
        """(mean (D,), covariance (D, D)) as arrays; the covariance as `np.cov` gives it, with N - 1."""
        return self.mean.cpu().numpy(), (self.scatter / max(1, self.count - 1)).cpu().numpy()
