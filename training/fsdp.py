"""Sharded training (FSDP2): each rank keeps a shard of the weights, gradients, optimizer state and moving averages.

A sharded weight is a `DTensor`: full by its shape, of which this rank holds some rows. A block's weights are gathered
before it is computed and dropped after it; its gradients are averaged over all ranks, and each rank keeps its shard.
"""
import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import distributed
from common.errors import ArgumentError

FSDP_MODES = ("all", "node")


def init_mesh(fsdp, timeout=distributed.DEFAULT_TIMEOUT):
    """Arrange the ranks for sharding over "all", or over those of a "node" with replicas on others. All ranks call it.

    Returns a mesh with the dimensions ("shard",), or ("replicate", "shard"). Raises an `ArgumentError` for a single
    rank, and for nodes with different numbers of ranks. `timeout` is in minutes.
    """
    world_size, device_type = distributed.world_size(), distributed.device().type
    if world_size == 1:
        raise ArgumentError("a single process has nothing to shard over. Start several by torchrun --nproc_per_node=8, "
                            "or leave the flag out", fsdp=fsdp)
    if fsdp == "all":
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    per_node = os.environ.get("LOCAL_WORLD_SIZE", "none")
    distributed.assert_same_on_all_ranks(per_node, "--fsdp node: the numbers of processes per node (LOCAL_WORLD_SIZE)")
    if not per_node.isdecimal() or not 1 < int(per_node) <= world_size or world_size % int(per_node):
        raise ArgumentError("every node must have the same number of processes, two or more; LOCAL_WORLD_SIZE, which "
                            f"torchrun sets, is {per_node} of {world_size}", fsdp=fsdp)
    ranks = torch.arange(world_size).view(-1, int(per_node))
    groups = [dist.new_subgroups_by_enumeration(lists.tolist(), timeout=timedelta(minutes=timeout))[0]
              for lists in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=("replicate", "shard"))


def shard_model(model, mesh, precision="fp32"):
    """Shard a DiT in place, block by block, on the device of the mesh. The weights keep their names.

    With bf16, blocks that hold nothing but linear layers are gathered in bfloat16: the same numbers as autocast's at
    half of the traffic. Gradients are reduced in float32.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        gathers_bf16 = precision == "bf16" and has_only_linear_weights(block)
        fully_shard(block, mesh=mesh, mp_policy=bf16 if gathers_bf16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    if mesh.ndim == 2:  # replicas start equal even if the processors of two nodes round an initialization differently
        for weight in model.parameters():
            dist.broadcast(to_local(weight.detach()), group=mesh.get_group("replicate"), group_src=0)
    return model


def has_only_linear_weights(module):
    """Return whether all weights of a module belong to linear layers."""
    return all(isinstance(part, nn.Linear) for part in module.modules() if list(part.parameters(recurse=False)))


def is_sharded(model):
    """Return whether `shard_model` was applied to a model."""
    return isinstance(model, FSDPModule)


def to_local(tensor):
    """Return this rank's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor):
    """Gather a sharded tensor, on all ranks; return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(pattern, tensor):
    """Shard a full tensor like `pattern`, without communication; return it as it is if `pattern` is not sharded."""
    if not isinstance(pattern, DTensor) or not torch.is_tensor(tensor) or tensor.shape != pattern.shape:
        return tensor
    mesh = pattern.device_mesh
    shards = tensor.chunk(mesh.size(mesh.ndim - 1))
    number = mesh.get_local_rank(mesh.ndim - 1)
    shard = shards[number] if number < len(shards) else tensor[:0]
    return DTensor.from_local(shard.to(pattern.device, copy=True), mesh, pattern.placements, run_check=False,
                              shape=pattern.shape, stride=pattern.stride())


def load_full_weights(model, sharded):
    """Fill a model on the meta device with the gathered weights of a sharded one. Called by all ranks."""
    model.to_empty(device=sharded.device)
    with torch.no_grad():
        sources = (*sharded.parameters(), *sharded.buffers())
        for target, source in zip((*model.parameters(), *model.buffers()), sources):
            target.copy_(full_tensor(source))


def total_grad_norm(grads):
    """Return the norm of all gradients, sharded or not: a scalar on the device, the same on all ranks."""
    norm = nn.utils.get_total_norm([to_local(grad) for grad in grads])
    if not isinstance(grads[0], DTensor):
        return norm
    mesh, square = grads[0].device_mesh, norm.square()
    dist.all_reduce(square)  # over all replicas too, so that not even rounding can differ between them
    return (square / (mesh.size() // mesh.size(mesh.ndim - 1))).sqrt()


@contextlib.contextmanager
def grad_sync(network, is_last):
    """Compute the gradients of a microbatch within this block; synchronize ranks after the last one.

    DDP accumulates locally and averages after the last microbatch. FSDP averages after each, since full gradients would
    take the memory that it saves; replicas on other nodes wait for the last one.
    """
    if is_sharded(network):
        network.set_requires_all_reduce(is_last)
    with contextlib.nullcontext() if is_last or is_sharded(network) else distributed.no_sync(network):
        yield
