"""Ending a run at the same step on all ranks, with everything saved, whatever happened to one of them."""
from common import distributed
from common.errors import Stopped


class FaultTolerance:
    """Agree between ranks, once a step and without waiting, whether to stop.

    The training loop makes two calls:

        is_stopping = faults.poll()                   # after each step
        faults.finish(step, path, end_step, log)      # after the last checkpoint

    Reasons to stop are a signal (SIGTERM, SIGUSR1), a fault of the data (an unreadable image, a dead worker process),
    and too many bad steps in a row. They are known on all ranks one step after they occurred on one; batches are loaded
    two steps ahead, so that no rank lacks one before.
    """

    def __init__(self, signals, loader, guard, checkpoints):
        self.signals, self.loader, self.guard, self.checkpoints = signals, loader, guard, checkpoints
        self.reducer = distributed.AsyncFlagReducer()
        self.was_signaled = self.has_data_fault = self.has_write_failed = False

    def poll(self):
        """Return whether all ranks stop after this step. Called by all ranks."""
        self.was_signaled, self.has_data_fault, self.has_write_failed = self.reducer.exchange(
            self.signals.received, self.loader.fault, self.checkpoints.has_failed())
        return self.is_stopping()

    def is_stopping(self):
        """Return the answer of the last `poll`, with what the guard counted since."""
        return bool(self.was_signaled or self.has_data_fault or self.guard.is_exhausted)

    def finish(self, step, path, end_step, log):
        """Wait for the checkpoints, of which `path` is the last, then raise what ended the run. Called by all ranks.

        Raises:
            UserError: After too many bad steps, a fault of the data, or a failed write.
            Stopped: After a signal, unless the run was complete.
        """
        self.checkpoints.wait()
        self.guard.raise_if_exhausted(path)
        with distributed.raise_on_all_ranks():
            self.loader.check()
        if self.was_signaled and step < end_step:
            log(f"Stopped by {self.signals.received or 'another process'} after {step} steps; --resume auto continues")
            raise Stopped
