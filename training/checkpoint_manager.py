"""When and how a run is saved, how many checkpoints are kept, and which one is resumed."""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from common import distributed
from common.checkpoint_io import (
    latest_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from common.errors import UserError
from common.files import remove_temporary_files, replace_with_hard_link
from training.run_dir import create_run_dir, list_run_dirs


def find_checkpoint_to_resume(resume, results_dir, model_name, warn):
    """The checkpoint that --resume names: a path; the newest whole one in an experiment's folder; or "auto": that of
    the experiment of this model in results_dir that has the highest number and a checkpoint; None where there is none.
    """
    if resume == "auto":
        folders = list_run_dirs(results_dir, model_name)
        folder = next((folder for folder in reversed(folders) if latest_checkpoint(folder)), None)
        return folder and latest_valid_checkpoint(folder, warn)
    if os.path.isdir(resume):
        path = latest_valid_checkpoint(resume, warn)
        if path is None:
            raise UserError(f"--resume {resume}: this folder holds no checkpoints/NNNNNNN.pt")
        return path
    if not os.path.isfile(resume):
        raise UserError(f"--resume {resume}: there is no such checkpoint; pass a file, an experiment's folder, or auto")
    verify_checkpoint(resume)
    return resume


def open_run_dir(results_dir, model_name, resume):
    """The run's folder, the checkpoint that it goes on from (None: a new run), and warnings about damaged ones."""
    warnings = []
    path = find_checkpoint_to_resume(resume, results_dir, model_name, warnings.append) if resume else None
    if path is None:
        return create_run_dir(results_dir, model_name), None, warnings
    parent, inner = os.path.split(os.path.dirname(os.path.abspath(path)))
    # Going on from elsewhere, or from an older checkpoint, is another experiment: in the same folder "the newest" would
    # then be one that this run does not descend from. Unless the newer ones are damaged.
    named_itself = os.path.isfile(resume)
    is_newest = inner == "checkpoints" and os.path.samefile(latest_checkpoint(parent) or os.devnull, path)
    return (parent if is_newest or not named_itself else create_run_dir(results_dir, model_name)), path, warnings


class CheckpointManager:
    """Writes checkpoints on the main process. Whatever goes wrong there is raised on all.

    state       a `TrainState`
    folder      the experiment's
    keep        keep so many of the newest; None: all
    milestones  keep those of every so many steps besides, for ever; None: no others
    protected   path of a checkpoint that is never removed: the one this run goes on from
    background  return at once, and write while training goes on
    """

    def __init__(self, state, folder, keep=None, milestones=None, protected=None, background=False):
        self.state, self.folder = state, folder
        self.keep, self.milestones, self.protected = keep, milestones, protected
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver") if background else None
        self.writing = None
        if distributed.is_rank0():
            with contextlib.suppress(OSError):  # a folder that cannot be written to is told at the first checkpoint
                remove_temporary_files(os.path.join(folder, "checkpoints"))

    def save(self, step):
        """Write the state after `step` steps; returns its path. To be called by all processes.

        In the background, the values are those of this moment. A `UserError` of the checkpoint before comes here.
        """
        path = os.path.join(self.folder, "checkpoints", f"{step:07d}.pt")
        self.state.guard.settle()
        self.finish()
        with distributed.raise_on_all_ranks():
            values = self._values(self.state.copy if self.thread else self.state.values, step)
            if distributed.is_rank0():
                if self.thread is None:
                    self._write(values, path, step)
                else:
                    self.writing = self.thread.submit(self._write, values, path, step)
        return path

    def _values(self, of, step):
        """What is to be written, on the main process; all help where it is sharded."""
        return of(step) if distributed.is_rank0() or self.state.is_sharded else None

    def keep_best(self, step, is_saved):
        """Have the state of now, after `step` steps, as `checkpoints/best.pt`. To be called by all processes.

        In the foreground always: it is written before the score that makes it the best.
        is_saved  whether it has just been saved: then `best.pt` is another name of that file, which costs nothing
        """
        folder = os.path.join(self.folder, "checkpoints")
        path = os.path.join(folder, "best.pt")
        self.state.guard.settle()
        self.finish()
        is_done = is_saved and distributed.run_on_rank0_and_broadcast(
            lambda: replace_with_hard_link(os.path.join(folder, f"{step:07d}.pt"), path))
        if not is_done:
            with distributed.raise_on_all_ranks():
                values = self._values(self.state.values, step)
                if distributed.is_rank0():
                    save_checkpoint(path, values)
        return path

    def has_failed(self):
        """Whether writing in the background failed, on this process; `finish` then raises on all."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def finish(self):
        """Wait until everything is written. To be called by all processes."""
        with distributed.raise_on_all_ranks():
            self._wait()

    def _wait(self):
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, values, path, step):
        save_checkpoint(path, values)
        if self.keep is not None:
            self._thin_out(step)

    def _thin_out(self, step):
        """Remove what is neither new, nor a milestone, nor in use. Runs only when the newest one is on the disk."""
        # Later steps than this one are not of this run: what it went on from was damaged, or it went back.
        steps = {at: path for at, path in list_checkpoints(self.folder).items() if at <= step}
        for at in list(steps)[self.keep:]:
            milestone = self.milestones is not None and at % self.milestones == 0
            if not milestone and not self._is_protected(steps[at]):
                with contextlib.suppress(OSError):  # one too many is no reason to end a run
                    os.remove(steps[at])

    def _is_protected(self, path):
        return self.protected is not None and os.path.abspath(path) == os.path.abspath(self.protected)
