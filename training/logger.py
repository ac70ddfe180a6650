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
from common.errors import ArgumentError, UserError
from data.image_io import make_image_grid, save_image_grid


def open_log(run_dir):
    """Return the logger of a run: stdout and log.txt on rank 0, silent on other ranks."""
    logger = logging.getLogger("dit")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log line that meets a full disk is lost, and nothing else
    handlers = [logging.NullHandler()]
    if distributed.is_rank0():
        path = os.path.join(run_dir, "log.txt")
        try:
            handlers = [logging.StreamHandler(sys.stdout),
                        logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")]
        except OSError as error:
            raise ArgumentError(f"cannot write {path} ({error})", results_dir=os.path.dirname(run_dir)) from None
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class MetricLogger:
    """Log mean losses and speed over windows of steps. Losses stay on the device and are read once a window.

    The `logger` is that of `open_log`; TensorBoard writes to `run_dir/tensorboard`.
    """

    def __init__(self, logger, run_dir, start_step, end_step, global_batch_size):
        self.logger, self.run_dir, self.global_batch_size = logger, run_dir, global_batch_size
        self.tensorboard, self._warned = None, set()
        if distributed.is_rank0():
            with self._may_fail("TensorBoard's file"):
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=start_step + 1)
        self.bar = tqdm(total=end_step, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=not (distributed.is_rank0() and sys.stderr.isatty()))
        self._start_window()

    def __enter__(self):
        # Log lines go above the bar; on other ranks the redirection would make their silent loggers print.
        self._redirect = logging_redirect_tqdm([self.logger]) if distributed.is_rank0() else contextlib.nullcontext()
        self._redirect.__enter__()
        return self

    def __exit__(self, *error):
        self.bar.close()
        with self._may_fail("TensorBoard's file"):
            if self.tensorboard:
                self.tensorboard.close()
        self._redirect.__exit__(*error)
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()

    def _start_window(self):
        self.sums, self.applied, self.steps, self.start = 0, 0, 0, time.perf_counter()

    def update(self, losses, is_applied=True):
        """Count a step with its losses, scalar tensors; those of a step that was not applied enter no mean."""
        self.bar.update()
        self.steps += 1
        if is_applied is False:
            return
        self.names = list(losses)
        values = torch.stack([value.detach() for value in losses.values()])
        self.sums = self.sums + (values.where(is_applied, 0) if torch.is_tensor(is_applied) else values)
        self.applied = self.applied + is_applied

    def log(self, step, **scalars):
        """End the window: log the published line, and all scalars to TensorBoard. Called by all ranks."""
        applied = int(self.applied)
        if not applied:
            self.logger.info(f"(step={step:07d}) none of the last {self.steps} steps was applied")
            return self._start_window()
        means = dict(zip(self.names, distributed.all_reduce_mean(self.sums / applied).tolist()))
        rate = self.steps / (time.perf_counter() - self.start)
        self.logger.info(f"(step={step:07d}) Train Loss: {means['loss']:.4f}, Train Steps/Sec: {rate:.2f}")
        self.bar.set_postfix(loss=f"{means['loss']:.4f}")
        train = means | scalars | dict(skipped_steps=self.steps - applied)
        self._add_scalars(step, "train", train)
        self._add_scalars(step, "speed", dict(images_per_second=rate * self.global_batch_size, memory_gb=memory_gb()))
        return self._start_window()

    def log_scores(self, step, scores):
        """Log the scores of an evaluation."""
        self.logger.info(f"(step={step:07d}) " + ", ".join(f"{name}: {value:.4f}" for name, value in scores.items()))
        self._add_scalars(step, "eval", scores)

    def log_images(self, step, images, columns):
        """Write a grid of images (N, C, H, W) in [-1, 1] as `samples/0000100.png`, and to TensorBoard."""
        path = os.path.join(self.run_dir, "samples", f"{step:07d}.png")
        with self._may_fail(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_image_grid(images, columns, path)
            self.logger.info(f"(step={step:07d}) Samples: {path}")
            if self.tensorboard:
                self.tensorboard.add_image("samples", make_image_grid(images, columns), step)

    def warn_once(self, name, warning):
        """Log a warning, unless it is None or one of this name was logged before."""
        if warning and name not in self._warned:
            self._warned.add(name)
            self.logger.info(warning)

    @contextlib.contextmanager
    def paused(self):
        """Leave the time of this block out of the training speed."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def _add_scalars(self, step, group, scalars):
        if self.tensorboard:
            with self._may_fail("TensorBoard's file"):
                for name, value in scalars.items():
                    self.tensorboard.add_scalar(f"{group}/{name}", value, step)

    @contextlib.contextmanager
    def _may_fail(self, path):
        """Log a failure of this block, such as a full disk, and continue without TensorBoard."""
        try:
            yield
        except (OSError, UserError, ImportError) as error:
            self.logger.info(f"WARNING: cannot write {path} ({error}); training continues without TensorBoard")
            self.tensorboard = None


def memory_gb():
    """Return memory of this process in GB: the peak on its GPU, or what is resident now if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
