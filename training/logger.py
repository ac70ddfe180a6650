"""What people see of a run: log.txt, progress bar, TensorBoard, pictures."""
import contextlib
import logging
import os
import sys
import time

import psutil
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import distributed
from common.errors import UserError
from data.image_io import make_image_grid, save_image_grid


def open_log(folder, is_main):
    """The run's logger: stdout and log.txt on the main process, silence on the others. raise: `UserError`"""
    logger = logging.getLogger("dit")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log line that finds the disk full is lost, and nothing else
    handlers = [logging.NullHandler()]
    if is_main:
        path = os.path.join(folder, "log.txt")
        try:
            handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(path)]
        except OSError as error:
            raise UserError(f"--results-dir: cannot write {path} ({error})") from None
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class MetricLogger:
    """Shows a run: means of the losses over each window of steps, and how fast it goes.

    Losses stay on the device; they are read once a window. TensorBoard's files go to `folder/tensorboard`.
    """

    def __init__(self, logger, folder, first_step, last_step, global_batch_size):
        self.logger, self.folder = logger, folder
        self.global_batch_size = global_batch_size
        self.tensorboard = None
        if distributed.is_rank0():
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True,
                        disable=not (distributed.is_rank0() and sys.stderr.isatty()))
        self._start_window()

    def __enter__(self):
        # Lines go above the bar. Not on the other processes: the redirection would give their silent loggers a voice.
        is_main = distributed.is_rank0()
        self._redirect = logging_redirect_tqdm([self.logger]) if is_main else contextlib.nullcontext()
        self._redirect.__enter__()
        return self

    def __exit__(self, *error):
        """End the run, however it ended: no line can be logged after it."""
        self.bar.close()
        if self.tensorboard:
            with self._only_watching("TensorBoard's file"):
                self.tensorboard.close()
        self._redirect.__exit__(*error)
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()

    def _start_window(self):
        self.sums, self.applied, self.steps, self.start = 0, 0, 0, time.perf_counter()

    def add(self, losses, applied=True):
        """Count a step.

        losses   a dictionary of scalar tensors, means over this process' rows
        applied  a truth value, which may be on the device: the losses of a step that was not applied enter no mean
        """
        self.names = list(losses)
        values = torch.stack([value.detach() for value in losses.values()])
        self.sums = self.sums + (values.where(applied, 0) if torch.is_tensor(applied) else values)
        self.applied = self.applied + applied
        self._count()

    def skip(self):
        """Count a step that was not applied."""
        self._count()

    def _count(self):
        self.bar.update()
        self.steps += 1

    def show(self, step, **scalars):
        """End the window: log the published line, and every scalar to TensorBoard."""
        applied = int(self.applied)
        if not applied:
            self.logger.info(f"(step={step:07d}) none of the last {self.steps} steps was applied")
            return self._start_window()
        means = distributed.all_reduce_mean(self.sums / applied).tolist()
        means = dict(zip(self.names, means))
        rate = self.steps / (time.perf_counter() - self.start)
        self.logger.info(f"(step={step:07d}) Train Loss: {means['loss']:.4f}, Train Steps/Sec: {rate:.2f}")
        self.bar.set_postfix(loss=f"{means['loss']:.4f}")
        record = {f"train/{name}": value for name, value in means.items()}
        record |= {f"train/{name}": float(value) for name, value in scalars.items()}
        record |= {"speed/images_per_second": rate * self.global_batch_size, "speed/memory_gb": memory_gb(),
                   "train/skipped_steps": self.steps - applied}
        if self.tensorboard:
            with self._only_watching("TensorBoard's file"):
                for name, value in record.items():
                    self.tensorboard.add_scalar(name, value, step)
        return self._start_window()

    def show_scores(self, step, scores):
        """Log the scores of an evaluation, and give them to TensorBoard."""
        self.logger.info(f"(step={step:07d}) " + ", ".join(f"{name}: {value:.4f}" for name, value in scores.items()))
        if self.tensorboard:
            with self._only_watching("TensorBoard's file"):
                for name, value in scores.items():
                    self.tensorboard.add_scalar(f"eval/{name}", value, step)

    @contextlib.contextmanager
    def paused(self):
        """A block that is no training: its time does not count in the speed."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def show_images(self, step, images, columns):
        """Write a grid of images (N, C, H, W) in [-1, 1] as `samples/0000100.png`, and to TensorBoard."""
        path = os.path.join(self.folder, "samples", f"{step:07d}.png")
        with self._only_watching(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_image_grid(images, columns, path)
            self.logger.info(f"(step={step:07d}) Samples: {path}")
            if self.tensorboard:
                self.tensorboard.add_image("samples", make_image_grid(images, columns), step)

    @contextlib.contextmanager
    def _only_watching(self, what):
        """A block whose failure, on a full disk say, is told and does not end the run. TensorBoard is left off then."""
        try:
            yield
        except (OSError, UserError) as error:
            self.logger.info(f"WARNING: cannot write {what} ({error}); training goes on without TensorBoard")
            self.tensorboard = None


def memory_gb():
    """Memory of this process in GB: the peak on its GPU where there is one, else what is resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
