"""Steps that must not change anything: a non-finite loss or gradient, or a loss spike."""
import logging
import math

import torch

from common import distributed
from common.errors import ArgumentError

NON_FINITE = "its gradient is non-finite"
AVERAGED_STEPS = 100  # window of the average loss; before that many steps no loss counts as a spike


class NonFiniteGuard:
    """Decide after each backward pass, alike on all ranks, whether the optimizer may use the gradient.

    Args:
        max_bad_steps (int): Bad steps in a row that end the run.
        max_loss_spike (float): Multiple of the average loss above which a step is bad. Default: no loss is too large.
        sample_indices (callable): step -> data-set indices of the step's global batch, a list per rank.

    Attributes:
        logger (Logger): Receives a warning about each bad step, on every rank.
    """

    logger = logging.getLogger("dit")

    def __init__(self, max_bad_steps, max_loss_spike=None, sample_indices=lambda step: [[]] * distributed.world_size()):
        self.max_bad_steps, self.max_loss_spike, self.sample_indices = max_bad_steps, max_loss_spike, sample_indices
        self.total, self.in_a_row = 0, 0
        self.average, self.averaged = 0.0, 0
        self.pending = None

    def state_dict(self):
        """Return the counters. All ranks call `settle` before it, since a warning takes all of them."""
        if self.pending:
            raise RuntimeError("the guard has not been settled")
        return dict(total=self.total, in_a_row=self.in_a_row, average=self.average, averaged=self.averaged)

    def load_state_dict(self, state):
        """Restore the counters. A run that ended by bad steps may try again when a person restarts it."""
        self.total, self.in_a_row, self.averaged = (int(state[name]) for name in ("total", "in_a_row", "averaged"))
        self.average = float(state["average"])
        if min(self.total, self.in_a_row, self.averaged) < 0 or not 0 <= self.average < math.inf:
            raise ValueError(f"the counters of bad steps are {state}")
        if self.is_exhausted and not distributed.read_environment_number("TORCHELASTIC_RESTART_COUNT", 0):
            self.in_a_row = 0

    @property
    def is_exhausted(self):
        """Whether there were too many bad steps in a row."""
        return self.in_a_row >= self.max_bad_steps

    def check(self, step, loss, grad_norm, sample_losses):
        """Return whether a step may be applied, the same on all ranks. Reads the norm from the device.

        Args:
            step (int): Number of steps before this one.
            loss (Tensor): Mean loss of the local rows, a scalar.
            grad_norm (Tensor): Norm of the averaged gradient, a scalar, the same on all ranks.
            sample_losses (Tensor): Losses of the local rows, shape (N,).
        """
        fault = None if math.isfinite(grad_norm) else NON_FINITE
        if fault is None and self.max_loss_spike is not None:
            fault = self._find_spike(float(distributed.all_reduce_mean(loss)))
        return self._count(step, fault, sample_losses)

    def check_later(self, step, is_finite, sample_losses):
        """Count a step on which the device decided, without waiting for it: `is_finite` is read at the next call."""
        self.settle()
        self.pending = step, distributed.AsyncHostCopy(is_finite), sample_losses

    def settle(self):
        """Read the device's decision on the last step. Called by all ranks."""
        pending, self.pending = self.pending, None
        if pending:
            step, is_finite, sample_losses = pending
            self._count(step, None if is_finite.read() else NON_FINITE, sample_losses)

    def _count(self, step, fault, sample_losses):
        if fault is None:
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        self.logger.info(
            f"WARNING: (step={step + 1:07d}) not applied, {fault} ({self.in_a_row} in a row; {self.max_bad_steps} end "
            f"the run); {self._describe_samples(sample_losses, self.sample_indices(step))}")
        return False

    def _find_spike(self, loss):
        """Describe a loss spike, or return None after adding the loss to the average."""
        if self.averaged >= AVERAGED_STEPS and loss > self.max_loss_spike * self.average:
            return f"its loss {loss:.4g} is more than {self.max_loss_spike:g} times the average {self.average:.4g}"
        self.averaged += 1
        weight = 1 / min(self.averaged, AVERAGED_STEPS)
        self.average += weight * (loss - self.average)
        return None

    def _describe_samples(self, sample_losses, indices):
        """Name the samples with a non-finite loss on any rank, or the global batch if there are none."""
        rows = torch.nonzero(~torch.isfinite(sample_losses)).flatten().tolist()
        bad = sorted(distributed.gather_objects([indices[distributed.rank()][row] for row in rows]))
        if bad:
            return f"samples whose loss is non-finite: {', '.join(map(str, bad))}"
        return f"samples of the step: {', '.join(str(index) for part in indices for index in part)}"

    def raise_if_exhausted(self, path):
        """Raise an `ArgumentError` after too many bad steps in a row; the checkpoint `path` has the last good state."""
        if self.is_exhausted:
            raise ArgumentError(f"{self.in_a_row} steps in a row could not be applied; log.txt names their samples. "
                                f"Check the data, lower the learning rate or clip the gradient, and resume {path}, "
                                "which holds the last good state", max_bad_steps=self.max_bad_steps)
