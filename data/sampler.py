"""Which items each rank loads at each step."""
import torch
from torch.utils.data import Sampler

from common import distributed
from common.errors import UserError
from common.seeding import DATA_ORDER, FLIP, seeded_generator


def local_batch_slice(global_batch_size, parts):
    """The slice of the global batch that this process computes, in so many parts. raise: `UserError`"""
    world = distributed.world_size()
    if global_batch_size % (world * parts):
        raise UserError(f"--global-batch-size {global_batch_size} cannot be shared by {world} processes "
                        f"in {parts} parts each (--grad-accum-steps): it must be a multiple of {world * parts}")
    share = global_batch_size // world
    return slice(distributed.rank() * share, (distributed.rank() + 1) * share)


class StepBatchSampler(Sampler):
    """For each training step, which items this process loads: a function of (seed, step, rows) alone.

    Every epoch is a new permutation of the data set, cut in global batches; what is left over at its end is not seen
    in that epoch. Yields lists of (index, flip).

    rows         slice of the global batch that this process computes
    first, last  steps first .. last - 1
    flips        mirror each image with probability 1/2
    """

    def __init__(self, num_items, global_batch_size, rows, seed, first, last, flips):
        self.steps_per_epoch = num_items // global_batch_size
        self.num_items, self.global_batch_size, self.rows = num_items, global_batch_size, rows
        self.seed, self.first, self.last, self.flips = seed, first, last, flips

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        order, order_epoch = None, None
        for step in range(self.first, self.last):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            start = batch * self.global_batch_size
            items = order[start:start + self.global_batch_size][self.rows]
            yield list(zip(items.tolist(), self._flips(step)[self.rows]))

    def _order(self, epoch):
        return torch.randperm(self.num_items, generator=seeded_generator(self.seed, DATA_ORDER, epoch))

    def items(self, step):
        """The indices of a step's whole global batch: a list a process."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        items = self._order(epoch)[batch * self.global_batch_size:][:self.global_batch_size].tolist()
        share = self.rows.stop - self.rows.start
        return [items[first:first + share] for first in range(0, len(items), share)]

    def _flips(self, step):
        if not self.flips:
            return [False] * self.global_batch_size
        return (torch.rand(self.global_batch_size, generator=seeded_generator(self.seed, FLIP, step)) < 0.5).tolist()
