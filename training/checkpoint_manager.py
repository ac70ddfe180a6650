"""Saving and restoring a run: when and how checkpoints are written, and how many are kept."""
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.tensor import DTensor

from common import distributed
from common.checkpoint_io import CHECKPOINT_NAME, list_checkpoints, load_checkpoint, save_checkpoint
from common.errors import ArgumentError, UserError
from common.files import ProcessLock, remove_temporary_files, replace_with_hard_link
from common.state_dicts import is_finite
from training.fsdp import full_tensor


class CheckpointManager:
    """Saves and restores any objects that have `state_dict` and `load_state_dict`.

        checkpoints = CheckpointManager(run_dir, dict(args=args), model=model, ema=ema, opt=optimizer)
        step = checkpoints.restore(path)
        checkpoints.save(step)

    Rank 0 writes; whatever goes wrong there is raised on all ranks. Sharded tensors are gathered.

    Args:
        run_dir (str): Folder of the run; checkpoints are `run_dir/checkpoints/0050000.pt`.
        metadata (dict): Plain values that every checkpoint holds too.
        keep_checkpoints (int): Number of latest checkpoints to keep. Default: all.
        keep_every (int): Steps between milestones that are kept permanently. Default: none.
        protected (str): Path of a checkpoint that is never removed: the one that the run resumed.
        async_save (bool): Write a copy in the background while training continues.
        **stateful: The objects; their names are the keys in a checkpoint. `settle()`, if defined, is called on all
            ranks before saving. An object without an entry in a checkpoint keeps its state.
    """

    def __init__(self, run_dir, metadata, keep_checkpoints=None, keep_every=None, protected=None, async_save=False,
                 **stateful):
        self.dir = os.path.join(run_dir, "checkpoints")
        self.run_dir, self.metadata, self.stateful = run_dir, metadata, stateful
        self.keep_checkpoints, self.keep_every, self.protected = keep_checkpoints, keep_every, protected
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if async_save else None
        self._writing = None
        if distributed.is_rank0():
            self._lock = ProcessLock(os.path.join(run_dir, "log.txt"))
            if not self._lock.is_held:
                raise UserError(f"another process trains in {run_dir}. Stop it, or start a run of its own")
            with contextlib.suppress(OSError):  # a folder that cannot be written to is reported by the first save
                remove_temporary_files(self.dir)

    def save(self, step):
        """Save the state after `step` steps and return the path of the checkpoint. Called by all ranks.

        With `async_save` a copy is written in the background; an error of the previous write is raised here.
        """
        path = os.path.join(self.dir, f"{step:07d}.pt")
        self._settle()
        with distributed.raise_on_all_ranks():
            values = self.state(step, copy=self._thread is not None)
            if distributed.is_rank0() and self._thread:
                self._writing = self._thread.submit(self._write, values, path, step)
            elif distributed.is_rank0():
                self._write(values, path, step)
        return path

    def save_best(self, step, is_saved):
        """Save the state after `step` steps as `best.pt` and return its path. Called by all ranks.

        It is on the disk when this returns, so that no score can claim a best checkpoint that does not exist. With
        `is_saved`, `save(step)` came just before: then `best.pt` is a hard link, which costs nothing.
        """
        path, saved = os.path.join(self.dir, "best.pt"), os.path.join(self.dir, f"{step:07d}.pt")
        self._settle()
        if is_saved and distributed.run_on_rank0_and_broadcast(lambda: replace_with_hard_link(saved, path)):
            return path
        with distributed.raise_on_all_ranks():
            values = self.state(step)
            if distributed.is_rank0():
                save_checkpoint(path, values)
        return path

    def state(self, step, copy=False):
        """Return what a checkpoint holds after `step` steps. Called by all ranks; complete on rank 0.

        Only sharded tensors are copied to host memory, with `copy` all; the others are live.
        """
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        return _to_host(state, copy, keep=distributed.is_rank0()) | self.metadata | dict(step=step)

    def restore(self, path, check=None):
        """Restore all objects from a checkpoint and return its step. Called by all ranks.

        `check` is called with the checkpoint before anything is restored, and raises if it is of another run.

        Raises:
            ArgumentError: If it is not the training state of such a run.
            UserError: If it is damaged.
        """
        stored = load_checkpoint(path)
        try:
            if check:
                check(stored)
            step = stored["step"] if "step" in stored else _step_in_name(path)
            if type(step) is not int or not 0 <= step < 2**62:
                raise ValueError(f"step is {step!r}")
            for name in self.stateful:
                if not is_finite(stored.get(name)):
                    raise UserError(f"its {name} holds values that are not finite. Resume an earlier checkpoint")
            for name, part in self.stateful.items():
                if stored.get(name):
                    _restore_part(part, stored[name], name)
            return step
        except ArgumentError:
            raise
        except UserError as error:
            raise ArgumentError(f"{error}", resume=path) from None
        except Exception as error:  # a file that holds something else causes errors of many types
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise ArgumentError(f"this is not a training state of this code ({reason})", resume=path) from None

    def has_failed(self):
        """Return whether writing in the background failed on this rank; `wait` then raises on all ranks."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self):
        """Wait until everything is written. Called by all ranks."""
        with distributed.raise_on_all_ranks():
            writing, self._writing = self._writing, None
            if writing is not None:
                writing.result()

    def _settle(self):
        """Finish what the objects and the background have pending. Called by all ranks."""
        for part in self.stateful.values():
            if hasattr(part, "settle"):
                part.settle()
        self.wait()

    def _write(self, values, path, step):
        save_checkpoint(path, values)
        if self.keep_checkpoints is not None:
            self._remove_old(step)

    def _remove_old(self, step):
        """Remove what is neither among the latest, nor a milestone, nor protected, once the latest is on the disk."""
        # Later steps were left in this folder before the run was resumed from an earlier step.
        steps = {at: path for at, path in list_checkpoints(self.run_dir).items() if at <= step}
        for at in list(steps)[self.keep_checkpoints:]:
            is_milestone = self.keep_every and at % self.keep_every == 0
            is_protected = self.protected and os.path.abspath(steps[at]) == os.path.abspath(self.protected)
            if not is_milestone and not is_protected:
                with contextlib.suppress(OSError):  # an extra checkpoint is no reason to end a run
                    os.remove(steps[at])


def _to_host(value, copy, keep):
    """Gather sharded tensors to host memory, with `copy` all others too; keep=False: only take part in gathering."""
    if torch.is_tensor(value):
        if not copy and not isinstance(value, DTensor):
            return value
        full = full_tensor(value.detach())
        return full.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: _to_host(part, copy, keep) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(part, copy, keep) for part in value)
    return value


def _restore_part(part, state, name):
    try:
        part.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # a state of another type or layout causes errors of many types
        raise UserError(f"its {name} ({type(state).__name__}) is not what this code writes "
                        f"({type(error).__name__}). Resume a checkpoint of train.py, or start a new run") from error


def _step_in_name(path):
    match = CHECKPOINT_NAME.fullmatch(os.path.basename(path))
    if match is None:
        raise ArgumentError("the file does not hold its step, and neither does its name (0050000.pt)", resume=path)
    return int(match[1])
