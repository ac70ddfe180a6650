"""From a set of images to what is known of it in a feature space, by any number of processes."""
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime import processes

from .moments import Moments


@dataclass
class Measured:
    """A set of images in a feature space.

    count     images
    pool      (mean, covariance) of the features
    spatial   the same of the second features, or None
    features  (n, D) float32 of all images, or of some, in their order; on the main process only, or None
    """
    count: int
    pool: tuple
    spatial: tuple = None
    features: torch.Tensor = None


def measure(accelerator, images, features, batch_size, keep=None, title="images", stopped=lambda: False):
    """Stream a set through a feature space. Every process takes a contiguous share.

    images   from `evaluation.sources`
    keep     keep the features of at most so many images, at equal distances; None: of all
    title    of the progress bar
    stopped  asked before every batch whether to give up
    return   `Measured` on every process; None where one of them gave up
    """
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(images)
    first, end = count * rank // world, count * (rank + 1) // world
    kept_rows = np.unique(np.linspace(0, count - 1, min(count, keep or count)).round().astype(int))
    moments, kept = {}, []
    with processes.together(accelerator), tqdm(total=end - first, unit="image", desc=title, leave=False,
                                               disable=not accelerator.is_main_process or None) as bar:
        for start in range(first, end, batch_size):
            if stopped():
                break
            stop = min(start + batch_size, end)
            found = features(images.batch(start, stop))
            for name, rows in found._asdict().items():
                if rows is not None:
                    moments.setdefault(name, Moments(rows.shape[1], rows.device)).add(rows)
            rows = kept_rows[(kept_rows >= start) & (kept_rows < stop)] - start
            kept.append(found.pool[torch.from_numpy(rows).to(found.pool.device)].cpu())
            bar.update(stop - start)
    moments = _alike(accelerator, moments)
    if not moments or any(moment.reduce(accelerator).count != count for moment in moments.values()):
        return None
    statistics = {name: moment.statistics() for name, moment in moments.items()}
    return Measured(count, features=_gathered(accelerator, kept), **statistics)


def _alike(accelerator, moments):
    """The same moments on every process: one that had no image joins in the sums with nothing."""
    sizes = {name: len(moment.mean) for name, moment in moments.items()}
    if accelerator.num_processes > 1:
        known = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(known, sizes)
        sizes = {name: size for found in known for name, size in found.items()}
    device = accelerator.device
    return {name: moments.get(name) or Moments(size, device) for name, size in sorted(sizes.items())}


def _gathered(accelerator, kept):
    """The rows of all processes in their order, on the main process; None on the others."""
    own = torch.cat(kept) if kept else None
    if accelerator.num_processes == 1:
        return own
    shapes = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(shapes, (0, 0) if own is None else tuple(own.shape))
    most, width = max(rows for rows, _ in shapes), max(width for _, width in shapes)
    padded = torch.zeros(most, width, device=accelerator.device)
    if own is not None:
        padded[: len(own)] = own
    everything = accelerator.gather(padded[None]).cpu()
    if not accelerator.is_main_process:
        return None
    return torch.cat([part[:rows] for part, (rows, _) in zip(everything, shapes)])
