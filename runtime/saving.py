"""When and how a run's checkpoints are written: together, in the background, and how many are kept."""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from . import checkpoint, processes
from .whole_file import linked, remove_unfinished


class Saver:
    """Writes checkpoints on the main process. Whatever goes wrong there is raised on all.

    state       a `TrainingState`
    folder      the experiment's
    keep        keep so many of the newest; None: all
    milestones  keep those of every so many steps besides, for ever; None: no others
    protected   path of a checkpoint that is never removed: the one this run goes on from
    background  return at once, and write while training goes on
    """

    def __init__(self, accelerator, state, folder, keep=None, milestones=None, protected=None, background=False):
        self.accelerator, self.state, self.folder = accelerator, state, folder
        self.keep, self.milestones, self.protected = keep, milestones, protected
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver") if background else None
        self.writing = None
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # a folder that cannot be written to is told at the first checkpoint
                remove_unfinished(os.path.join(folder, "checkpoints"))

    def save(self, step):
        """Write the state after `step` steps; returns its path. To be called by all processes.

        In the background, the values are those of this moment. A `UserError` of the checkpoint before comes here.
        """
        path = os.path.join(self.folder, "checkpoints", f"{step:07d}.pt")
        self.state.guard.settle()
        self.finish()
        with processes.together(self.accelerator):
            values = self._values(self.state.copy if self.thread else self.state.values, step)
            if self.accelerator.is_main_process:
                if self.thread is None:
                    self._write(values, path, step)
                else:
                    self.writing = self.thread.submit(self._write, values, path, step)
        return path

    def _values(self, of, step):
        """What is to be written, on the main process; all help where it is sharded."""
        return of(step) if self.accelerator.is_main_process or self.state.is_sharded else None

    def keep_best(self, step, is_saved):
        """Have the state of now, after `step` steps, as `checkpoints/best.pt`. To be called by all processes.

        In the foreground always: it is written before the score that makes it the best.
        is_saved  whether it has just been saved: then `best.pt` is another name of that file, which costs nothing
        """
        folder = os.path.join(self.folder, "checkpoints")
        path = os.path.join(folder, "best.pt")
        self.state.guard.settle()
        self.finish()
        is_done = is_saved and processes.on_main(
            self.accelerator, lambda: linked(os.path.join(folder, f"{step:07d}.pt"), path))
        if not is_done:
            with processes.together(self.accelerator):
                values = self._values(self.state.values, step)
                if self.accelerator.is_main_process:
                    checkpoint.save(path, values)
        return path

    def has_failed(self):
        """Whether writing in the background failed, on this process; `finish` then raises on all."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def finish(self):
        """Wait until everything is written. To be called by all processes."""
        with processes.together(self.accelerator):
            self._wait()

    def _wait(self):
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, values, path, step):
        checkpoint.save(path, values)
        if self.keep is not None:
            self._thin_out(step)

    def _thin_out(self, step):
        """Remove what is neither new, nor a milestone, nor in use. Runs only when the newest one is on the disk."""
        # Later steps than this one are not of this run: what it went on from was damaged, or it went back.
        steps = {at: path for at, path in checkpoint.steps_in(self.folder).items() if at <= step}
        for at in list(steps)[self.keep:]:
            milestone = self.milestones is not None and at % self.milestones == 0
            if not milestone and not self._is_protected(steps[at]):
                with contextlib.suppress(OSError):  # one too many is no reason to end a run
                    os.remove(steps[at])

    def _is_protected(self, path):
        return self.protected is not None and os.path.abspath(path) == os.path.abspath(self.protected)
