"""Which items each rank loads at each step."""
import torch
from torch.utils.data import Sampler

from common import distributed
from common.errors import ArgumentError
from common.seeding import DATA_ORDER, FLIP, seeded_generator


def local_batch_slice(global_batch_size, grad_accum_steps):
    """Return the slice of the global batch that this rank computes, in `grad_accum_steps` equal microbatches."""
    world_size = distributed.world_size()
    if global_batch_size % (world_size * grad_accum_steps):
        raise ArgumentError(f"the batch cannot be divided among {world_size} ranks with {grad_accum_steps} "
                            f"microbatches each. Choose a multiple of {world_size * grad_accum_steps}",
                            global_batch_size=global_batch_size, grad_accum_steps=grad_accum_steps)
    local_batch_size = global_batch_size // world_size
    return slice(distributed.rank() * local_batch_size, (distributed.rank() + 1) * local_batch_size)


class StepBatchSampler(Sampler):
    """For each training step, the items that this rank loads: a function of (seed, step, rows) alone.

    Every epoch is a new permutation of the data set, cut into global batches; the remainder is not seen in that epoch.
    Yields lists of (index, flip).

    Args:
        num_items (int): Length of the data set.
        global_batch_size (int): Items of a step, over all ranks.
        rows (slice): Rows of the global batch that this rank computes, see `local_batch_slice`.
        seed (int): Global seed.
        start_step (int): The first step.
        end_step (int): The step before which it ends.
        flips (bool): Whether each image is mirrored with probability 1/2.
    """

    def __init__(self, num_items, global_batch_size, rows, seed, start_step, end_step, flips):
        self.steps_per_epoch = num_items // global_batch_size
        self.num_items, self.global_batch_size, self.rows = num_items, global_batch_size, rows
        self.seed, self.start_step, self.end_step, self.flips = seed, start_step, end_step, flips

    def __len__(self):
        return self.end_step - self.start_step

    def __iter__(self):
        order, order_epoch = None, None
        for step in range(self.start_step, self.end_step):
            epoch = step // self.steps_per_epoch
            if epoch != order_epoch:
                order, order_epoch = self._draw_order(epoch), epoch
            items = self._cut_batch(order, step)[self.rows]
            yield list(zip(items.tolist(), self._draw_flips(step)[self.rows]))

    def items(self, step):
        """List the indices of the global batch of a step, one list per rank."""
        items = self._cut_batch(self._draw_order(step // self.steps_per_epoch), step)
        return [part.tolist() for part in items.split(self.rows.stop - self.rows.start)]

    def _cut_batch(self, order, step):
        start = step % self.steps_per_epoch * self.global_batch_size
        return order[start:start + self.global_batch_size]

    def _draw_order(self, epoch):
        return torch.randperm(self.num_items, generator=seeded_generator(self.seed, DATA_ORDER, epoch))

    def _draw_flips(self, step):
        if not self.flips:
            return [False] * self.global_batch_size
        return (torch.rand(self.global_batch_size, generator=seeded_generator(self.seed, FLIP, step)) < 0.5).tolist()
