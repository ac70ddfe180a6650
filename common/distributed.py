"""Ranks of a run: starting them, collectives between them, and splitting work over them.

The only module that uses accelerate. Without a launcher there is one rank, and every collective is the identity.
"""
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from common.errors import UserError

# Minutes. Rank 0 alone writes large files and draws previews while the others wait for it.
DEFAULT_TIMEOUT = 60

_accelerator = None  # set by `init`


def init(tf32=True, timeout=DEFAULT_TIMEOUT):
    """Start this rank and return its device: its GPU by local rank, Apple's GPU, or the CPU (gloo between ranks).

    Args:
        tf32 (bool): Compute float32 matrix products in TF32 on GPUs that have it, as the paper did.
        timeout (float): Minutes that a collective waits for the other ranks.

    Raises:
        UserError: If accelerate is configured for anything but data parallelism.
    """
    global _accelerator
    several = read_environment_number("WORLD_SIZE", 1) > 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)] if several else []
    if missing:
        raise UserError(f"the environment variable WORLD_SIZE asks for {os.environ['WORLD_SIZE']} processes, but there "
                        f"is no {', '.join(missing)}. Start them by torchrun, or use one process: unset WORLD_SIZE")
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    # Without cpu=True, accelerate forms no process group when ranks have no GPU.
    cpu = kind == "cpu" or (several and kind == "mps")
    # A saved `accelerate config` must not change what is computed: precision and compilation are set here.
    # Gradients are views of what DDP sends: no second copy of them.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    _accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if _accelerator.distributed_type not in supported:
        raise UserError(f"accelerate is configured for {_accelerator.distributed_type.value}, which this code does not "
                        "support. Run `accelerate config` again and choose plain data parallelism, or use torchrun.")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    return _accelerator.device


def shutdown():
    """Leave the process group at the end of a command."""
    if _accelerator is not None:
        _accelerator.end_training()


def device():
    """Return the device of this rank: the one that `init` chose, or the CPU before it."""
    return torch.device("cpu") if _accelerator is None else _accelerator.device


def _has_group():
    return dist.is_available() and dist.is_initialized()


def rank():
    """Return the rank of this process, 0 if it is alone."""
    return dist.get_rank() if _has_group() else 0


def world_size():
    """Return the number of ranks."""
    return dist.get_world_size() if _has_group() else 1


def local_world_size():
    """Return the number of ranks on this machine."""
    return read_environment_number("LOCAL_WORLD_SIZE", 1)


def read_environment_number(name, default):
    """Return a whole number that a launcher put into the environment; raise a `UserError` if it is none."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a whole number. Remove it: unset {name}")
    return int(text) if text else default


def is_rank0():
    """Return whether this is the rank that writes logs and checkpoints."""
    return rank() == 0


def print_rank0(*values):
    """Print on rank 0."""
    if is_rank0():
        print(*values, flush=True)


# ---------------------------------------------------------------- data parallelism

def data_parallel(model):
    """Move a model to this rank's device and wrap it in DDP if there are several ranks."""
    return _accelerator.prepare(model.to(device()))


def no_sync(network):
    """Return a context in which DDP accumulates gradients locally; without DDP it does nothing."""
    return network.no_sync() if hasattr(network, "no_sync") else nullcontext()


# ---------------------------------------------------------------- collectives

def all_reduce_sum(tensor):
    """Return the sum of a tensor over all ranks, on every rank."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor):
    """Return the mean of a tensor over all ranks, on every rank."""
    return all_reduce_sum(tensor) / world_size()


def all_gather(tensor):
    """Concatenate tensors of equal shape (n, ...) of all ranks, in their order: (world size * n, ...)."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(values):
    """Concatenate lists of picklable values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return list(values)
    lists = [None] * world_size()
    dist.all_gather_object(lists, list(values))
    return [value for part in lists for value in part]


@contextmanager
def raise_on_all_ranks():
    """Raise an error of one rank on all ranks, so that all continue after the block or none does.

    A `UserError` is printed once, by the first rank that met it.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world_size() == 1:
        if error is not None:
            raise error
        return
    is_user_error = isinstance(error, UserError)
    shared = error if is_user_error or error is None else UserError(f"{type(error).__name__}: {error}")
    errors = gather_objects([shared])
    failed = [number for number, found in enumerate(errors) if found is not None]
    if error is not None and not is_user_error:
        raise error
    if failed:
        first = errors[failed[0]]
        first.shown = rank() == failed[0]
        if len(failed) < len(errors):
            first.prefix = f"rank {failed[0]} of {len(errors)}: "
        raise first


def run_on_rank0_and_broadcast(function):
    """Call `function` on rank 0; return its result, or raise its error as a `UserError`, on every rank."""
    outcome = [None]
    with raise_on_all_ranks():
        if is_rank0():
            outcome[0] = function()
    if world_size() > 1:
        broadcast_object_list(outcome)
    return outcome[0]


def barrier():
    """Wait for all ranks."""
    with raise_on_all_ranks():
        pass


def assert_same_on_all_ranks(value, name):
    """Raise a `UserError` on all ranks if `value`, called `name` in the message, differs between them."""
    if world_size() > 1 and len(set(gather_objects([value]))) > 1:
        raise UserError(f"{name} differ between ranks: do all of them see the same files and flags?", shown=is_rank0())


# The phrases by which gloo and NCCL report that a peer is gone.
_LOST_PEER = ("Timed out waiting", "Timed out after", "Connection closed by peer", "Connection reset by peer",
              "Connection refused", "timeout caused pair closure", "Broken pipe", "Read error [", "Write error [",
              "Socket Timeout", "NCCL communicator was aborted", "remote process exited", "Watchdog caught collective")


@contextmanager
def collective_timeout(name, timeout=DEFAULT_TIMEOUT):
    """Turn the error of a collective that lost a peer into a `UserError` with the `name` of its work.

    It was allowed to wait `timeout` minutes.
    """
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if any(phrase in line for phrase in _LOST_PEER)]
        if not lines:
            raise
        raise UserError(f"{name}: another process is gone, or did not answer within {timeout:g} minutes. "
                        f"[{lines[0]}]") from None


# ---------------------------------------------------------------- without waiting

class AsyncHostCopy:
    """Non-blocking device-to-host copy. `read()` waits only for work queued before it."""

    def __init__(self, tensor):
        self.value, self.arrived = tensor, None
        if tensor.is_cuda:
            self.value, self.arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """Return the tensor in host memory."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.cpu()


class AsyncFlagReducer:
    """Combine flags of all ranks by OR once a step, without waiting: the answer to a step comes at the next one.

    All ranks get the answer at the same step, so that all act on it together.
    """

    def __init__(self):
        self.pending = None

    def exchange(self, *flags):
        """Return, for each flag, whether any rank set it at the previous call. A single rank gets its own at once."""
        if world_size() == 1:
            return [bool(flag) for flag in flags]
        values = torch.tensor([int(bool(flag)) for flag in flags]).to(device(), non_blocking=True)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        if values.is_cuda:
            work.wait()  # on CUDA the stream waits; with gloo this process would
        previous, self.pending = self.pending, (work, AsyncHostCopy(values))
        if previous is None:
            return [False] * len(flags)
        work, copy = previous
        work.wait()
        return copy.read().bool().tolist()


# ---------------------------------------------------------------- splitting work

def missing_ranges(done, batch_size):
    """List the unfinished items as ranges, each inside one batch of the grid 0, batch_size, 2 batch_size, ...

    The grid depends on the batch size alone, so that neither a kill nor the number of ranks changes which items are
    computed together.

    Args:
        done (ndarray): Which items are finished, boolean, shape (N,).
        batch_size (int): Length of a batch.

    Returns:
        list[tuple[int, int]]: Pairs (start, end), end exclusive.
    """
    ranges = []
    for start in range(0, len(done), batch_size):
        items = start + np.flatnonzero(~done[start:start + batch_size])
        runs = np.split(items, np.flatnonzero(np.diff(items) > 1) + 1)
        ranges += [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
    return ranges
