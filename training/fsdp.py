"""Sharded training (FSDP2): each process keeps a part of the weights, gradients, moments and moving average.

A sharded weight is a `DTensor`: whole by its shape, of whose rows this process holds some. Before a block is computed
its weights are gathered, and dropped after it; its gradients are averaged over all processes, and each keeps its part.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import distributed
from common.errors import UserError

FSDP_MODES = ("all", "node")


def init_mesh(where, timeout=distributed.DEFAULT_TIMEOUT):
    """How the processes share: in one row, or in a row a node. To be called by all processes.

    where     "all": over all processes; "node": over those of a node, all nodes the same
    timeout  minutes that a process waits for the others
    raise     UserError for one process, and nodes that are not alike
    """
    world, kind = distributed.world_size(), distributed.device().type
    if world == 1:
        raise UserError("--fsdp shares the model between processes, and this is one alone: start several by torchrun "
                        "--nproc_per_node=8, or leave the flag out")
    if where == "all":
        return init_device_mesh(kind, (world,), mesh_dim_names=("part",))
    a_node = os.environ.get("LOCAL_WORLD_SIZE", "none")
    distributed.assert_same_on_all_ranks(a_node, "--fsdp node: the numbers of processes of the nodes (LOCAL_WORLD_SIZE)")
    if not a_node.isdecimal() or not 1 < int(a_node) <= world or world % int(a_node):
        raise UserError("--fsdp node shares the model between the processes of a node, several, as many on each node; "
                        f"LOCAL_WORLD_SIZE, which torchrun sets, says {a_node} of {world}")
    ranks = torch.arange(world).view(-1, int(a_node))
    wait = distributed.timedelta(minutes=timeout)
    groups = [dist.new_subgroups_by_enumeration(lines.tolist(), timeout=wait)[0] for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, ranks, mesh_dim_names=("copy", "part"))


def shard_model(model, mesh, precision="fp32"):
    """Shard a DiT in place, block by block, and have it on the mesh's device. The weights keep their names.

    With bf16, blocks whose weights all belong to matrix products are gathered in bfloat16: the same numbers that
    autocast would make of them, at half of the traffic. Gradients are summed in float32.
    """
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        is_narrow = precision == "bf16" and has_only_linear_weights(block)
        fully_shard(block, mesh=mesh, mp_policy=narrow if is_narrow else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    if mesh.ndim == 2:  # the copies begin alike, whatever the nodes' processors make of a seed
        for weight in model.parameters():
            dist.broadcast(to_local(weight.detach()), group=mesh.get_group("copy"), group_src=0)
    return model


def has_only_linear_weights(module):
    """Whether all weights below belong to linear layers."""
    return all(isinstance(part, nn.Linear) for part in module.modules() if list(part.parameters(recurse=False)))


def is_sharded(model):
    return isinstance(model, FSDPModule)


def to_local(tensor):
    """The part of a sharded tensor that this process holds; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor):
    """A sharded tensor put together, by all processes; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(pattern, tensor):
    """A whole tensor as a sharded one like `pattern`, without communication; as it is where that is not sharded."""
    if not isinstance(pattern, DTensor) or not torch.is_tensor(tensor) or tensor.shape != pattern.shape:
        return tensor
    mesh = pattern.device_mesh
    parts = tensor.chunk(mesh.size(mesh.ndim - 1))
    number = mesh.get_local_rank(mesh.ndim - 1)
    part = parts[number] if number < len(parts) else tensor[:0]
    return DTensor.from_local(part.to(pattern.device, copy=True), mesh, pattern.placements, run_check=False,
                              shape=pattern.shape, stride=pattern.stride())


def load_full_weights(model, sharded):
    """Give a model without weights (on "meta") those of a sharded one. To be called by all processes."""
    model.to_empty(device=next(sharded.parameters()).device)
    with torch.no_grad():
        for ours, theirs in zip((*model.parameters(), *model.buffers()), (*sharded.parameters(), *sharded.buffers())):
            ours.copy_(full_tensor(theirs))


def total_grad_norm(grads):
    """The norm over all gradients, of which each process may hold a part; the same number on all of them."""
    norm = nn.utils.get_total_norm([to_local(grad) for grad in grads])
    if not isinstance(grads[0], DTensor):
        return norm
    mesh, square = grads[0].device_mesh, norm.square()
    dist.all_reduce(square)  # over all copies, so that not even rounding can part them
    return (square / (mesh.size() // mesh.size(mesh.ndim - 1))).sqrt()


@contextlib.contextmanager
def grad_sync(network, is_last):
    """A block that computes the gradients of a part of the batch, of the last one or another.

    DDP adds up in each process and averages after the last part. Sharded gradients are averaged after every part, since
    whole ones would take the memory that is to be saved; the copies of other nodes wait for the last one.
    """
    if is_sharded(network):
        network.set_requires_all_reduce(is_last)
    with contextlib.nullcontext() if is_last or is_sharded(network) else distributed.no_sync(network):
        yield
