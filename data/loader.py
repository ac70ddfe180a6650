"""Loading batches ahead of the step that needs them."""
import collections
import contextlib
import warnings

from torch.utils.data import DataLoader

from common.errors import ArgumentError
from common.signals import DeferredSignalHandler, ignore_stop_signals_in_worker

# The number of workers is a flag; with fewer cores they wait for each other, which does no harm.
warnings.filterwarnings("ignore", "This DataLoader will create")


class PrefetchLoader:
    """The batches that a `StepBatchSampler` lists, loaded ahead: pairs of images and condition, on the device.

    A fault is known two steps before the batch that it concerns is missing: time for all ranks to learn of it
    (`AsyncFlagReducer`) and to stop after the same step. It is kept in `fault`, and raised where the batches end.

    Args:
        dataset (Dataset): A data set that returns `Batch`es.
        batches (StepBatchSampler): Lists of (index, flip).
        num_workers (int): Number of worker processes; 0 loads in this process.
        device (torch.device): Where the batches are needed.
        on_corrupt (callable): Called with a batch's `CorruptImage`s; must raise if the batch could not be filled.
    """

    NUM_AHEAD = 2

    def __init__(self, dataset, batches, num_workers, device, on_corrupt):
        self.device, self.on_corrupt = device, on_corrupt
        self.is_pinned = device.type == "cuda" and not dataset.on_device
        self.num_workers = num_workers = 0 if dataset.on_device else num_workers
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=identity_collate,
                            pin_memory=self.is_pinned, prefetch_factor=4 if num_workers else None,
                            worker_init_fn=ignore_stop_signals_in_worker)
        self.fault, self.queue, self.source = None, collections.deque(), iter(loader)
        # torch answers the death of a worker with an exception at any line of this process, be it inside the
        # optimizer's step. Deferred, it is raised while a batch is waited for.
        self.worker_deaths = DeferredSignalHandler.install("SIGCHLD") if num_workers else contextlib.nullcontext()
        self._load(self.NUM_AHEAD)
        self.check()

    def __iter__(self):
        while True:
            self._load(self.NUM_AHEAD + 1)
            if not self.queue:
                return self.check()
            yield self.queue.popleft()

    def _load(self, count):
        """Fill the queue up to `count` batches, or up to the end or a fault."""
        try:
            while self.source is not None and len(self.queue) < count:
                with self.worker_deaths:
                    images, cond, corrupt = next(self.source)
                if corrupt:
                    self.on_corrupt(corrupt)
                self.queue.append((self._to_device(images), {name: self._to_device(cond[name]) for name in cond}))
        except StopIteration:
            self.source = None
        except Exception as error:
            worker_death = describe_worker_death(error, self.num_workers) if self.num_workers else None
            self.source, self.fault = None, worker_death or error

    def _to_device(self, tensor):
        return tensor.to(self.device, non_blocking=self.is_pinned)

    def check(self):
        """Raise the fault, if there is one."""
        if self.fault:
            raise self.fault


def raise_worker_deaths(loader):
    """Yield the batches of a `DataLoader`; the death of a worker is an `ArgumentError`."""
    try:
        yield from loader
    except Exception as error:
        worker_death = describe_worker_death(error, loader.num_workers) if loader.num_workers else None
        raise worker_death or error from None


def describe_worker_death(error, num_workers=None):
    """Return the `ArgumentError` for an error that follows from the death of a worker, None for any other error."""
    is_reported = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    if is_reported or isinstance(error, (ConnectionError, EOFError)):  # the latter if it died while it was sending
        reason = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
        return ArgumentError(f"a process that loads data died ({reason}). If memory is short, use fewer",
                             num_workers=num_workers)
    return None


def identity_collate(batch):
    """Return the batch: data sets collate by themselves."""
    return batch
