"""Starting processes and agreeing between them."""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from .errors import UserError
from .later import Later

# Minutes. The main process alone writes large files and draws previews while the others wait for it.
PATIENCE = 60


def start(tf32=True, patience=PATIENCE):
    """An `Accelerator` on this process' device: its own GPU by local rank, Apple's, or the CPU (gloo between them).

    tf32      matrix products of float32 tensors in TF32 on GPUs that have it, as the paper trained; False: full float32
    patience  minutes that a process waits for the others before it gives up
    raise     UserError for a way of running that this code was not written for
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    # Where processes have no GPU each, accelerate must be told so, or each of them would believe it is alone.
    cpu = kind == "cpu" or (several and kind == "mps")
    # Precision and compilation are not left to a saved `accelerate config`, which must not change what is computed.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no",
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=patience))])
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if accelerator.distributed_type not in plain:
        raise UserError(f"accelerate is configured for {accelerator.distributed_type.value}, this code is for "
                        "plain data parallelism: run `accelerate config` again, or use torchrun")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    return accelerator


class Watch:
    """Once a step, each process hears what any of them had to say a step before, so that all act on it together.

    Nobody waits for it: the answer to one step's question is fetched at the next, when it has long arrived.
    """

    def __init__(self, accelerator):
        self.accelerator, self.asked = accelerator, None

    def exchange(self, *words):
        """Say some truth values; returns, for each, whether any process said it at the call before.

        (A single process hears itself at once.)
        """
        if self.accelerator.num_processes == 1:
            return [bool(word) for word in words]
        said = torch.tensor([int(bool(word)) for word in words]).to(self.accelerator.device, non_blocking=True)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True)
        if said.is_cuda:
            work.wait()  # here it is the stream that waits; with gloo it would be this process
        asked, self.asked = self.asked, (work, Later(said))
        if asked is None:
            return [False] * len(words)
        work, answers = asked
        work.wait()
        return answers.read().bool().tolist()


@contextmanager
def waiting(what, patience=PATIENCE):
    """Say in a sentence that the other processes did not come to a collective operation: `what`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text for sign in LOST_PEER):
            raise
        reason = next(line for line in text.splitlines() if any(sign in line for sign in LOST_PEER))
        raise UserError(f"{what}: another process is gone, or did not answer within {patience:g} minutes. "
                        f"[{reason.strip()}]") from None


# How gloo and NCCL say so.
LOST_PEER = ("Timed out waiting", "Timed out after", "Connection closed by peer", "Connection reset by peer",
             "Connection refused", "timeout caused pair closure", "Broken pipe", "NCCL", "Read error", "Write error",
             "Socket Timeout")


@contextmanager
def together(accelerator):
    """A block after which all processes go on, or none: an error on one of them is raised on all.

    A `UserError` is printed once, by the first process that met it.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    messages = gather_object([None if error is None else f"{error}"])
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if error is not None and not isinstance(error, UserError):
        raise error
    if failed:
        where = "" if len(failed) == len(messages) else f"process {failed[0]} of {len(messages)}: "
        raise UserError(where + messages[failed[0]], shown=accelerator.process_index == failed[0])


def on_main(accelerator, function):
    """Call `function` on the main process alone and give every process its result, or its `UserError`."""
    outcome = [None]
    with together(accelerator):
        if accelerator.is_main_process:
            outcome[0] = function()
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    return outcome[0]


def barrier(accelerator):
    """Wait for all processes."""
    with together(accelerator):
        pass


def check_alike(accelerator, value, what):
    """A `UserError` where the processes do not see the same: `what` is its name."""
    if accelerator.num_processes > 1 and len(set(gather_object([value]))) > 1:
        raise UserError(f"{what} are not the same on all processes", shown=accelerator.is_main_process)
