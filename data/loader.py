"""Loading batches ahead of the step that needs them."""
import collections
import contextlib
import signal

from torch.utils.data import DataLoader

from common.errors import UserError
from common.signals import DeferredSignalHandler, ignore_stop_signals_in_worker


class PrefetchLoader:
    """The batches that a `StepBatchSampler` asks for, loaded ahead: pairs of images (n, C, H, W) and labels (n,).

    So a fault is known two steps before the batch that it concerns is missed: time for all processes to hear of it
    (`AsyncFlagReducer`) and to stop after the same step. It is in `fault`, an exception, and is raised where the batches end.

    num_workers  worker processes; 0: load in this one
    on_bad       called with the `CorruptImage`s of each batch, if any; it must raise where a batch could not be filled
    """

    AHEAD = 2

    def __init__(self, data, batches, num_workers, device, on_bad):
        self.device, self.on_bad = device, on_bad
        self.pinned = device.type == "cuda" and not data.on_device
        self.num_workers = num_workers = 0 if data.on_device else num_workers
        loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, collate_fn=identity_collate,
                            pin_memory=self.pinned, prefetch_factor=4 if num_workers else None,
                            worker_init_fn=ignore_stop_signals_in_worker)
        self.fault, self.queue, self.source = None, collections.deque(), iter(loader)
        # torch answers the death of a worker with an exception wherever this process happens to be, in the middle of
        # the optimiser's step too. Here it comes where a batch is waited for.
        self.deaths = DeferredSignalHandler.install(signal.SIGCHLD) if num_workers else contextlib.nullcontext()
        self._load(self.AHEAD)
        self.check()

    def __iter__(self):
        while True:
            self._load(self.AHEAD + 1)
            if not self.queue:
                return self.check()
            yield self.queue.popleft()

    def _load(self, count):
        """Have `count` batches in the queue, or what there is up to the end or to a fault."""
        try:
            while self.source is not None and len(self.queue) < count:
                with self.deaths:
                    images, labels, bad = next(self.source)
                if bad:
                    self.on_bad(bad)
                self.queue.append((images.to(self.device, non_blocking=self.pinned),
                                   labels.to(self.device, non_blocking=self.pinned)))
        except StopIteration:
            self.source = None
        except Exception as error:
            self.source, self.fault = None, (self.num_workers and describe_worker_death(error)) or error

    def check(self):
        """Raise the fault, if there is one."""
        if self.fault:
            raise self.fault


def describe_worker_death(error):
    """What is met where a worker died, as a sentence with what to do; None of any other error."""
    told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    if told or isinstance(error, (ConnectionError, EOFError)):  # the latter where it died while it was sending
        return UserError(f"a process that loads data died: {str(error).rstrip('. ')}. Where memory is short, lower "
                         "--num-workers")
    return None


def identity_collate(batch):
    """Data sets answer with whole batches: nothing is left to collate."""
    return batch
