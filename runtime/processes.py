"""Starting processes and agreeing between them."""
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .errors import UserError


def start(**accelerator_arguments):
    """An `Accelerator` on this process' device: its own GPU by local rank, Apple's, or the CPU (gloo between them)."""
    # Without a GPU accelerate must be told so, or every process of torchrun would believe that it is alone.
    return Accelerator(cpu=not torch.accelerator.is_available(), **accelerator_arguments)


def allow_tf32(allowed):
    """Matrix products of float32 tensors in TF32 on GPUs that have it, as the paper trained; or in full float32."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def together(accelerator):
    """A block that fails on every process or on none: its `UserError` is printed by the main process alone."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error), shown=accelerator.is_main_process) from None


def on_main(accelerator, function):
    """Call `function` on the main process alone and give every process its result.

    A `UserError` there is raised everywhere, and printed by the main process alone.
    """
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1], shown=accelerator.is_main_process)
    return outcome[0]
