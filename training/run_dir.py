"""The folders of training runs: results/000-DiT-XL-2."""
import os
import re

from common.errors import UserError


def list_run_dirs(results_dir, model_name=None):
    """Folders `NNN-DiT-XL-2` in results_dir, of one model or of all, in order of their numbers."""
    model = re.escape(model_name.replace("/", "-")) if model_name else ".+"
    names = os.listdir(results_dir) if os.path.isdir(results_dir) else []
    numbered = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(rf"(\d{{3,}})-{model}", name)))
    return [os.path.join(results_dir, name) for _, name in numbered]


def create_run_dir(results_dir, model_name):
    """Make and return the next `results/NNN-DiT-XL-2`, with its `checkpoints` inside."""
    taken = list_run_dirs(results_dir)
    number = int(os.path.basename(taken[-1]).split("-")[0]) + 1 if taken else 0
    folder = os.path.join(results_dir, f"{number:03d}-{model_name.replace('/', '-')}")
    try:
        os.makedirs(os.path.join(folder, "checkpoints"))
    except OSError as error:
        raise UserError(f"--results-dir {results_dir}: cannot make {folder} ({error})") from None
    return folder
