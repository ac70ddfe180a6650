"""Memory of a training step, from its allocations; nothing is computed."""
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from common.compute import DEFAULT_COMPUTE
from diffusion import create_diffusion

TRACED_BATCHES = (2, 4)  # memory is linear in the batch size: two batches determine the line


@dataclass(frozen=True)
class Timeline:
    """Bytes alive in a part of a training step in addition to weights, optimizer and EMA, one entry per allocation."""

    fixed: np.ndarray  # activations and temporaries that do not depend on the batch size
    per_image: np.ndarray  # activations and temporaries of each image
    copies: np.ndarray  # weights in bfloat16, which autocast keeps to the end of the step
    gradients: np.ndarray  # gradients computed so far


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of training in bytes, as `estimate_step_memory` finds it."""

    weights: int  # of the full network; likewise the next three
    gradients: int
    optimizer: int
    ema: int
    outside_blocks: int  # weights outside the blocks
    block: int  # weights of the largest block
    gathers_bf16: bool  # whether FSDP gathers the blocks in bfloat16
    backward: Timeline  # computation of the gradients
    update: Timeline  # the optimizer step

    def persistent(self, world_size=1, fsdp=False):
        """Return {part: bytes} on each device, without activations.

        "exchange" is what several devices need in addition. DDP: nothing, since gradients are views of its buckets.
        FSDP, which shards everything else: what is gathered at a time, about the weights outside the blocks, the
        weights of the current and the next block, the gradients of the current and the previous one.
        """
        shards = world_size if fsdp else 1
        parts = dict(weights=self.weights, gradients=self.gradients, optimizer=self.optimizer, ema=self.ema)
        parts = {name: size // shards for name, size in parts.items()}
        gathered = self.outside_blocks + 2 * self.block // (2 if self.gathers_bf16 else 1) + 2 * self.block
        parts["exchange"] = gathered if fsdp and world_size > 1 else 0
        return parts

    def activations(self, batch, fsdp=False):
        """Return the peak of activations, temporaries and autocast's copies with `batch` images per device."""
        return int((self._fixed_activations(fsdp) + self.backward.per_image * batch).max())

    def peak(self, batch, world_size=1, fsdp=False):
        """Return the peak of all memory with `batch` images per pass on each device."""
        fixed, per_image = self._total_lines(world_size, fsdp)
        return int((fixed + per_image * batch).max())

    def largest_batch(self, memory, world_size=1, fsdp=False):
        """Return how many images per pass on each device fit into `memory` bytes; 0: not even one."""
        fixed, per_image = self._total_lines(world_size, fsdp)
        if (fixed > memory).any():
            return 0
        grows = per_image > 0
        return int(((memory - fixed[grows]) // per_image[grows]).min())

    def _fixed_activations(self, fsdp):
        is_gathered = fsdp and self.gathers_bf16  # what FSDP gathers in bfloat16 needs no copy
        return self.backward.fixed + (0 if is_gathered else self.backward.copies)

    def _total_lines(self, world_size, fsdp):
        """Return all bytes over a step: what does not depend on the batch, and what each image takes."""
        shards, parts = world_size if fsdp else 1, self.persistent(world_size, fsdp)
        # DDP allocates its buckets, of which gradients are views, before the first step.
        has_buckets = world_size > 1 and not fsdp
        persistent = sum(size for name, size in parts.items() if name != "gradients" or has_buckets)
        backward = self._fixed_activations(fsdp) + (0 if has_buckets else self.backward.gradients // shards)
        # The optimizer's temporaries are of the size of what it updates.
        update = (self.update.fixed + (0 if has_buckets else self.update.gradients)) // shards
        return (persistent + np.concatenate([backward, update]),
                np.concatenate([self.backward.per_image, self.update.per_image]))


def estimate_step_memory(build, compute=DEFAULT_COMPUTE, checkpointed=0.0, num_microbatches=1, fused=False):
    """Estimate the memory of a training step by tracing its tensors without computing them.

    They are torch's fake tensors on the CPU, whose attention is one kernel that keeps its inputs, its output and one
    number per query and head, as the fused kernels of GPUs do. Not included: what kernels use internally, what
    libraries reserve, the VAE, and what torch.compile saves.

    Args:
        build (callable): () -> DiT.
        compute (ComputeConfig): Its precision counts.
        checkpointed (float): Share of the blocks that recompute their activations.
        num_microbatches (int): Passes per step; from the second on, gradients exist already.
        fused (bool): Fused AdamW, which needs no temporaries.

    Returns:
        MemoryEstimate: The estimate for any batch size.
    """
    (sizes, *small), (_, *large) = (_trace_step(build, batch, compute, checkpointed, min(num_microbatches, 2), fused)
                                    for batch in TRACED_BATCHES)
    if [len(events) for events in small] != [len(events) for events in large]:
        raise RuntimeError("a training step depends on the batch size: its memory is not linear in it")
    backward, update = (_build_timeline(*pair) for pair in zip(small, large))
    return MemoryEstimate(**sizes, backward=backward, update=update)


ACTIVATION, GRADIENT, COPY, MOMENT = range(4)  # kinds of memory


def _trace_step(build, batch, compute, checkpointed, passes, fused):
    """Return the sizes of a `MemoryEstimate`, and the events of the backward pass and of the optimizer step.

    Events are arrays of shape (events, 2): kind and bytes, negative if memory is freed.
    """
    diffusion, tracker = create_diffusion(""), AllocationTracker()
    with FakeTensorMode():
        model = build().train()
        model.checkpointed = checkpointed
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        kernel = dict(fused=True) if fused else dict(foreach=True)  # foreach is the default on GPUs
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, **kernel)
        tracker.ignore(model.parameters())
        with tracker:
            for _ in range(passes):
                _accumulate_gradients(model, diffusion, compute, batch, passes)
            gradients = tracker.allocations(weight.grad for weight in trained)
            end_of_backward = len(tracker.events)
            optimizer.step()
        moments = tracker.allocations(value for state in optimizer.state.values() for value in state.values())
        kinds = dict.fromkeys(tracker.copies, COPY) | dict.fromkeys(gradients, GRADIENT)
        kinds |= dict.fromkeys(moments, MOMENT)
        events = np.array([(kinds.get(allocation, ACTIVATION), size) for allocation, size in tracker.events])
        sizes = _measure_weights(model, trained, compute)
    backward, update = events[:end_of_backward], events[end_of_backward:]
    # The update starts with what the backward pass left.
    left = [(kind, backward[backward[:, 0] == kind, 1].sum()) for kind in (ACTIVATION, GRADIENT, COPY)]
    return sizes, backward, np.concatenate([left, update])


def _accumulate_gradients(model, diffusion, compute, batch, passes):
    """Do what `TrainStep` does with a microbatch."""
    shape = (batch, *model.sample_shape)
    x, noise, t = torch.empty(shape), torch.empty(shape), torch.empty(batch, dtype=torch.long)
    drop = torch.empty(batch) if model.has_null_condition else None
    losses = diffusion.training_losses(compute.wrap(model), x, t, dict(y=t, force_drop_ids=drop), noise)
    (losses["loss"].mean() / passes).backward()


def _measure_weights(model, trained, compute):
    weights, blocks = _num_bytes(model.parameters()), [_num_bytes(block.parameters()) for block in model.blocks]
    # FSDP gathers blocks in bfloat16 if all of their weights are of linear layers.
    is_linear = all(isinstance(module, torch.nn.Linear) for module in model.blocks.modules()
                    if list(module.parameters(recurse=False)))
    return dict(weights=weights, gradients=_num_bytes(trained), optimizer=2 * _num_bytes(trained), ema=weights,
                outside_blocks=weights - sum(blocks), block=max(blocks),
                gathers_bf16=is_linear and compute.precision == "bf16")


def _num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _build_timeline(small, large):
    """Build a `Timeline` from the events of the same part with the two traced batches."""
    small_batch, large_batch = TRACED_BATCHES
    per_image = (large[:, 1] - small[:, 1]) // (large_batch - small_batch)
    fixed = small[:, 1] - per_image * small_batch

    def alive(sizes, kind):
        return np.cumsum(sizes * (small[:, 0] == kind))

    return Timeline(fixed=alive(fixed, ACTIVATION), per_image=alive(per_image, ACTIVATION), copies=alive(fixed, COPY),
                    gradients=alive(fixed, GRADIENT))


class AllocationTracker(TorchDispatchMode):
    """Record when the memory of tensors is allocated and freed.

    Values of fake tensors do not exist; if the code reads one it gets 1, or False.

    Attributes:
        events (list[tuple[int, int]]): (number of the allocation, bytes), with negative bytes if it is freed.
        copies (set[int]): Allocations that are conversions of ignored tensors to another type.
    """

    def __init__(self):
        super().__init__()
        self.events, self.copies, self.ignored, self.alive = [], set(), {}, {}

    def ignore(self, tensors):
        """Do not record tensors that exist already."""
        self.ignored |= {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    def allocations(self, tensors):
        """Return the numbers of the recorded allocations of these tensors."""
        return {self.alive[id(tensor.untyped_storage())] for tensor in tensors
                if id(tensor.untyped_storage()) in self.alive}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is not torch.bool
        result = function(*args, **(kwargs or {}))
        is_copy = function is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self.ignored
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._record(tensor.untyped_storage(), is_copy)
        return result

    def _record(self, storage, is_copy):
        key, number, size = id(storage), len(self.events), storage.nbytes()
        if key in self.ignored or key in self.alive:
            return
        self.alive[key] = number
        self.events.append((number, size))
        if is_copy:
            self.copies.add(number)
        weakref.finalize(storage, self._free, key, number, size)

    def _free(self, key, number, size):
        del self.alive[key]
        self.events.append((number, -size))
