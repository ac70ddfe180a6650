"""Files that tests write, and what a run leaves behind."""
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.checkpoint_io import list_checkpoints, load_checkpoint

STATE = ("/model", "/ema", "/opt", "/schedule_sampler")  # in `differences` of checkpoints: what a step changes


def folder_of(results, number=0):
    """Return the folder of the run with a number."""
    return next(results.glob(f"{number:03d}-*"))


def checkpoint_path(results, step, number=0):
    return folder_of(results, number) / "checkpoints" / f"{step:07d}.pt"


def stored(results, step, number=0):
    """Load the checkpoint of a run after `step` steps."""
    return load_checkpoint(str(checkpoint_path(results, step, number)))


def steps_of(results, number=0):
    """List the steps of a run's checkpoints, ascending."""
    return sorted(list_checkpoints(str(folder_of(results, number))))


def losses(results):
    """List the losses in log.txt."""
    (log,) = results.glob("*/log.txt")
    return [float(loss) for loss in re.findall(r"Train Loss: (\S+),", log.read_text())]


def scalars(results, name="train/loss"):
    """Return {step: value} of a TensorBoard tag; of a step that was logged twice, the last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder_of(results) / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def largest_difference(a, b, part="model"):
    """Return the largest absolute difference of weights in two checkpoints."""
    return max((a[part][name] - b[part][name]).abs().max().item() for name in a[part])


def differences(one, two, path=""):
    """List the paths of values that differ between two checkpoints, bit for bit; their flags may differ."""
    if torch.is_tensor(one):
        return [] if torch.is_tensor(two) and torch.equal(one, two) else [path]
    if isinstance(one, dict):
        names = [name for name in one if not (path == "" and name == "args")]
        missing = [f"{path}/{name}" for name in set(one) ^ set(two)]
        return missing + [inner for name in names if name in two
                          for inner in differences(one[name], two[name], f"{path}/{name}")]
    if isinstance(one, (list, tuple)):
        return [path] if len(one) != len(two) else [
            inner for i, pair in enumerate(zip(one, two)) for inner in differences(*pair, f"{path}/{i}")]
    return [] if one == two else [path]


def picture(*shape, seed=0):
    """Return uint8 noise of shape (H, W, ...)."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def images_of(count, seed):
    """Return noise around a color of the seed, shape (count, 4, 4, 3), uint8."""
    random = np.random.default_rng(seed)
    return np.clip(random.normal(100 + 10 * seed, 30, (count, 4, 4, 3)), 0, 255).astype(np.uint8)


def write_images(root, files):
    """Write {"class/name.png": PIL image or bytes} and return the folder's path as text."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return str(root)


def write_noise(root, count, *shape):
    """Write noise as 0.png, 1.png, ...; return the folder's path as text."""
    return write_images(root, {f"{i}.png": Image.fromarray(picture(*shape, seed=i)) for i in range(count)})


def read_files(folder):
    """Return {name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(path):
    """Read an image as integers, shape (H, W, ...)."""
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


class Payload:
    """Create a file if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
