"""Steps that must not change anything: a loss or gradient that is not finite, or a loss that jumps."""

import logging
import math
import os

import torch

from common import distributed
from common.errors import UserError

NOT_FINITE = "its gradient is not finite"
AVERAGED_STEPS = 100  # the loss is compared with its average over about so many; before that many, nothing is a jump


class NonFiniteGuard:
    """Decides after each backward pass, alike on all processes, whether the optimiser may see its gradient.

    max_bad_steps  so many bad steps in a row end the run
    max_spike      a loss of so many times its average is bad, too; None: no loss is too large
    logger         told of each bad step, on every process
    """

    logger = logging.getLogger("dit")

    def __init__(self, max_bad_steps, max_spike=None):
        self.max_bad_steps, self.max_spike = max_bad_steps, max_spike
        self.total, self.in_a_row, self.average, self.averaged = 0, 0, 0.0, 0
        self.noted = None

    def state_dict(self):
        """To be called when all processes have settled, since telling of a bad step takes all of them."""
        if self.noted:
            raise RuntimeError("the guard has not been settled")
        return dict(total=self.total, in_a_row=self.in_a_row, average=self.average, averaged=self.averaged)

    def load_state_dict(self, state):
        self.total, self.in_a_row, self.averaged = (int(state[name]) for name in ("total", "in_a_row", "averaged"))
        self.average = float(state["average"])
        if self.exhausted and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            self.in_a_row = 0  # the run ended so, and a person who starts it again wants it tried again

    @property
    def exhausted(self):
        """Whether there were too many bad steps in a row."""
        return self.in_a_row >= self.max_bad_steps

    def note(self, step, is_finite, sample_losses, items):
        """Hear of a step on which the device decided, by whether its gradient is finite, without waiting for it.

        is_finite  a truth value on the device; the rest as for `allows`
        """
        self.settle()
        self.noted = step, distributed.AsyncHostCopy(is_finite), sample_losses, items

    def settle(self):
        """Read what the device decided on the step that was noted last. To be called by all processes."""
        noted, self.noted = self.noted, None
        if noted:
            step, is_finite, sample_losses, items = noted
            self._judge(step, None if is_finite.read() else NOT_FINITE, sample_losses, items)

    def allows(self, step, loss, grad_norm, sample_losses, items):
        """Whether step number `step` may be applied.

        loss           mean over this process' rows
        grad_norm      of the averaged gradient, which is the same on all processes
        sample_losses  (n,) of this process' rows
        items          called with the step for the data-set indices of its samples: a list a process
        """
        fault = None if math.isfinite(grad_norm) else NOT_FINITE
        if fault is None and self.max_spike is not None:
            fault = self._spike(float(distributed.all_reduce_mean(loss)))
        return self._judge(step, fault, sample_losses, items)

    def _judge(self, step, fault, sample_losses, items):
        """Count a step, and tell of its fault, if it has one. Returns whether it has none."""
        if fault is None:
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        self.logger.info(
            f"WARNING: (step={step + 1:07d}) not applied, {fault} ({self.in_a_row} of {self.max_bad_steps} in a row "
            f"that --max-bad-steps allows); {self._culprits(sample_losses, items(step))}")
        return False

    def _spike(self, loss):
        """What is wrong with the loss, or None; then it enters the average."""
        if self.averaged >= AVERAGED_STEPS and loss > self.max_spike * self.average:
            return (f"its loss {loss:.4g} is more than {self.max_spike:g} times (--max-loss-spike) the average "
                    f"{self.average:.4g}")
        self.averaged += 1
        weight = 1 / min(self.averaged, AVERAGED_STEPS)
        self.average += weight * (loss - self.average)
        return None

    def _culprits(self, sample_losses, items):
        """The data-set indices of the samples whose own loss is not finite, or of the whole batch if there are none."""
        own = items[distributed.rank()]
        bad = [own[row] for row in torch.nonzero(~torch.isfinite(sample_losses)).flatten().tolist()]
        if distributed.world_size() > 1:
            bad = distributed.gather_objects(bad)
        if bad:
            return f"samples whose loss is not finite: {', '.join(map(str, sorted(bad)))}"
        return f"samples of the step: {', '.join(str(index) for rows in items for index in rows)}"

    def check(self, path):
        """End the run where there were too many bad steps in a row; `path`: where the last good state was saved."""
        if self.exhausted:
            raise UserError(f"{self.in_a_row} steps in a row could not be applied (--max-bad-steps); log.txt names "
                            f"their samples. The last good state is in {path}. Lower --lr, set --max-grad-norm or look "
                            "at the data, and --resume it")
