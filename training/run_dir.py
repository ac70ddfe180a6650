"""Folders of training runs: results/000-DiT-XL-2 with log.txt and checkpoints/0050000.pt."""
import contextlib
import errno
import os
import re

from common.checkpoint_io import latest_checkpoint, latest_valid_checkpoint, verify_checkpoint
from common.errors import ArgumentError
from common.files import probe_writing


def list_run_dirs(results_dir, model_name=None):
    """List the folders `NNN-DiT-XL-2` in `results_dir`, of one model or of all, in the order of their numbers."""
    model = re.escape(model_name.replace("/", "-")) if model_name else ".+"
    names = os.listdir(results_dir) if os.path.isdir(results_dir) else []
    numbered = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(rf"(\d{{3,}})-{model}", name)))
    return [os.path.join(results_dir, name) for _, name in numbered]


def create_run_dir(results_dir, model_name):
    """Create the next `results/NNN-DiT-XL-2` with its folder `checkpoints`, and return its path."""
    while True:
        existing = list_run_dirs(results_dir)
        number = int(os.path.basename(existing[-1]).split("-")[0]) + 1 if existing else 0
        run_dir = os.path.join(results_dir, f"{number:03d}-{model_name.replace('/', '-')}")
        try:
            os.makedirs(os.path.join(run_dir, "checkpoints"))
            return run_dir
        except FileExistsError:  # another run took the number in the meantime, or a file has the name of a folder
            if os.path.isdir(run_dir):
                continue
            raise ArgumentError(f"{run_dir} is a file, not a folder", results_dir=results_dir) from None
        except OSError as error:
            raise ArgumentError(f"cannot create {run_dir} ({error}). Name a folder that can be written to",
                                results_dir=results_dir) from None


def remove_unused_run_dir(run_dir):
    """Remove the folder of a run that could not start, unless there is something in it."""
    log = os.path.join(run_dir, "log.txt")
    with contextlib.suppress(OSError):
        if os.path.exists(log) and not os.path.getsize(log):
            os.unlink(log)
        os.rmdir(os.path.join(run_dir, "checkpoints"))
        os.rmdir(run_dir)


def open_run_dir(results_dir, model_name, resume=None):
    """Find or create the folder of a run, and find the checkpoint that it resumes, as `find_checkpoint_to_resume` does.

    Returns:
        tuple[str, str, list[str]]: The run's folder, the checkpoint to resume (None: start a new run), and warnings
        about damaged checkpoints and a folder that cannot be written to.

    Raises:
        ArgumentError: If there is nothing to resume, or no folder can be made.
    """
    warnings = []
    path = find_checkpoint_to_resume(resume, results_dir, model_name, warnings.append) if resume else None
    if path is None:
        return create_run_dir(results_dir, model_name), None, warnings
    run_dir, inner = os.path.split(os.path.dirname(os.path.abspath(path)))
    # Naming a foreign or an older checkpoint starts another run: in the same folder, "the latest" would then be a
    # checkpoint that this run does not descend from.
    is_latest = inner == "checkpoints" and os.path.samefile(latest_checkpoint(run_dir) or os.devnull, path)
    if os.path.isfile(resume) and not is_latest:
        return create_run_dir(results_dir, model_name), path, warnings
    error = probe_writing(os.path.join(run_dir, "checkpoints"), is_folder=True)
    if error and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):  # others, such as a full disk, may pass
        foreign, run_dir = run_dir, create_run_dir(results_dir, model_name)
        warnings.append(f"WARNING: {foreign} cannot be written to; the run continues in {run_dir}")
    return run_dir, path, warnings


def find_checkpoint_to_resume(resume, results_dir, model_name, warn):
    """Return the path of the checkpoint that `resume` names, or None if "auto" finds none.

    `resume` is a checkpoint; a run's folder, for its latest valid checkpoint; or "auto", for that of the run of this
    model with the highest number that has a checkpoint. `warn` is called with a sentence about each damaged checkpoint
    that is skipped.

    Raises:
        ArgumentError: If there is no such file, or no checkpoint in the folder.
        UserError: If the checkpoint, or all checkpoints of the run, are damaged.
    """
    if resume == "auto":
        run_dirs = reversed(list_run_dirs(results_dir, model_name))
        run_dir = next((run_dir for run_dir in run_dirs if latest_checkpoint(run_dir)), None)
        return run_dir and latest_valid_checkpoint(run_dir, warn)
    if os.path.isdir(resume):
        path = latest_valid_checkpoint(resume, warn)
        if path is None:
            run_dirs = [run_dir for run_dir in list_run_dirs(resume) if latest_checkpoint(run_dir)]
            hint = f". It is a folder of {len(run_dirs)} runs; the latest is {run_dirs[-1]}" if run_dirs else ""
            raise ArgumentError(f"this folder holds no checkpoints/NNNNNNN.pt{hint}", resume=resume)
        return path
    if not os.path.isfile(resume):
        raise ArgumentError("there is no such checkpoint; pass a file, a run's folder, or auto", resume=resume)
    verify_checkpoint(resume)
    return resume
