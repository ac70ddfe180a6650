"""The memory of a training step, from its allocations; nothing is computed."""
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from common.compute import DEFAULT_COMPUTE
from diffusion import create_diffusion

TRACED_BATCHES = (2, 4)  # for which a step is followed; for others its memory is on the line through them


@dataclass(frozen=True)
class Timeline:
    """What lives beside weights, optimiser and EMA, through a part of a training step: bytes, an entry an event.

    fixed      activations and temporaries: what any batch has,
    an_image   and what each image adds
    copies     weights in bfloat16, which autocast keeps to the end of the step
    gradients  those that are there already
    """

    fixed: np.ndarray
    an_image: np.ndarray
    copies: np.ndarray
    gradients: np.ndarray


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on a device, as `estimate_step_memory` found them.

    weights, gradients, optimizer, ema  of the whole network
    outside, block                      weights outside of the blocks, and of the largest block
    narrow                              whether FSDP gathers the blocks in bfloat16
    backward, update                    `Timeline` of the gradients' computation, and of the optimiser's step
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    outside: int
    block: int
    narrow: bool
    backward: Timeline
    update: Timeline

    def kept(self, devices=1, fsdp=False):
        """{what: bytes} on each device, beside activations.

        exchange  between several devices. DDP: the buckets that it sends, a second copy of the gradients. FSDP, where
                  all else is a share: what is whole at a time, about what lies outside of the blocks, the weights of
                  the block at work and of the next one, the gradients of one and those of another on their way
        """
        share = devices if fsdp else 1
        parts = dict(weights=self.weights, gradients=self.gradients, optimizer=self.optimizer, ema=self.ema)
        parts = {name: size // share for name, size in parts.items()}
        gathered = self.outside + 2 * self.block // (2 if self.narrow else 1) + 2 * self.block
        parts["exchange"] = 0 if devices == 1 else gathered if fsdp else self.gradients
        return parts

    def activations(self, batch, fsdp=False):
        """Activations and temporaries of `batch` images at their peak, and autocast's copies of the weights."""
        fixed, an_image = self._living(fsdp)
        return int((fixed + an_image * batch).max())

    def at_most(self, batch, devices=1, fsdp=False):
        """The peak in bytes with `batch` images in a pass on each device."""
        fixed, an_image = self._lines(devices, fsdp)
        return int((fixed + an_image * batch).max())

    def largest_batch(self, memory, devices=1, fsdp=False):
        """How many images a pass on each device may have within `memory` bytes; 0: not even one."""
        fixed, an_image = self._lines(devices, fsdp)
        if (fixed > memory).any():
            return 0
        grows = an_image > 0
        return int(((memory - fixed[grows]) // an_image[grows]).min())

    def _living(self, fsdp):
        line = self.backward
        is_gathered = fsdp and self.narrow  # in bfloat16, each time anew: there is nothing to copy
        return line.fixed + (0 if is_gathered else line.copies), line.an_image

    def _lines(self, devices, fsdp):
        """All bytes over a step: what any batch has, and what each image adds."""
        share = devices if fsdp else 1
        kept = sum(size for name, size in self.kept(devices, fsdp).items() if name != "gradients")
        fixed, an_image = self._living(fsdp)
        # The optimiser's temporaries are of the size of what it updates.
        return (kept + np.concatenate([fixed + self.backward.gradients // share,
                                       (self.update.fixed + self.update.gradients) // share]),
                np.concatenate([an_image, self.update.an_image]))


def estimate_step_memory(build, compute=DEFAULT_COMPUTE, checkpointed=0.0, parts=1, fused=False):
    """The memory of a training step of a network: every tensor of one is followed, and none computed.

    The tensors are torch's fake ones on the CPU, where attention is one kernel that keeps its inputs, its output and a
    number a query and head, as the fused kernels of GPUs do. Not in it: what kernels use inside, what libraries
    reserve, the VAE, and what torch.compile saves.

    build         () -> the network
    speed         its precision counts
    checkpointed  share of the blocks whose activations are computed twice
    parts         of the batch, one after the other; from two on, a pass finds gradients there
    fused         the optimiser's step in one kernel, which needs no temporaries
    return        `MemoryEstimate`
    """
    (sizes, *small), (_, *large) = (_trace_step(build, batch, compute, checkpointed, min(parts, 2), fused)
                                    for batch in TRACED_BATCHES)
    if [len(events) for events in small] != [len(events) for events in large]:
        raise RuntimeError("a training step does other things with another batch: its memory is on no line")
    backward, update = (_timeline(*both) for both in zip(small, large))
    return MemoryEstimate(**sizes, backward=backward, update=update)


ACTIVATION, GRADIENT, COPY, KEPT = range(4)  # kinds of memory


def _trace_step(build, batch, compute, checkpointed, passes, fused):
    """Go through a training step. Returns the sizes of `MemoryEstimate`, and the events of the gradients' computation and
    of the optimiser's step: arrays (events, 2) of kind and bytes, below 0 where memory is given back.
    """
    diffusion, ledger = create_diffusion(""), AllocationTracker()
    with FakeTensorMode():
        model = build().train()
        model.checkpointed = checkpointed
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        way = dict(fused=True) if fused else dict(foreach=True)  # the default on GPUs
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, **way)
        ledger.know(model.parameters())
        with ledger:
            for _ in range(passes):
                _add_gradients(model, diffusion, compute, batch, passes)
            gradients, computed = ledger.numbers(weight.grad for weight in trained), len(ledger.events)
            optimizer.step()
        kept = ledger.numbers(value for state in optimizer.state.values() for value in state.values())
        kinds = dict.fromkeys(ledger.copies, COPY) | dict.fromkeys(gradients, GRADIENT) | dict.fromkeys(kept, KEPT)
        events = np.array([(kinds.get(number, ACTIVATION), size) for number, size in ledger.events])
        sizes = _sizes(model, trained, compute)
    # The second part begins with what the first one left.
    left = [(kind, events[:computed][events[:computed, 0] == kind, 1].sum()) for kind in (ACTIVATION, GRADIENT, COPY)]
    return sizes, events[:computed], np.concatenate([left, events[computed:]])


def _add_gradients(model, diffusion, compute, batch, passes):
    """What `TrainingStep.backward` does with a part of the batch, without values."""
    shape = (batch, model.in_channels, *model.x_embedder.input_size)
    x, noise, t = torch.empty(shape), torch.empty(shape), torch.empty(batch, dtype=torch.long)
    drop = torch.empty(batch) if model.y_embedder.has_null_class else None
    losses = diffusion.training_losses(compute.wrap(model), x, t, dict(y=t, force_drop_ids=drop), noise)
    (losses["loss"].mean() / passes).backward()


def _sizes(model, trained, compute):
    weights, blocks = _num_bytes(model.parameters()), [_num_bytes(block.parameters()) for block in model.blocks]
    # What FSDP gathers in bfloat16: blocks whose weights are all of linear layers.
    narrow = all(isinstance(part, torch.nn.Linear) for part in model.blocks.modules()
                 if list(part.parameters(recurse=False)))
    return dict(weights=weights, gradients=_num_bytes(trained), optimizer=2 * _num_bytes(trained), ema=weights,
                outside=weights - sum(blocks), block=max(blocks), narrow=narrow and compute.precision == "bf16")


def _num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _timeline(small, large):
    """`Timeline` from the events of the same part with the two batches of BATCHES."""
    few, many = TRACED_BATCHES
    an_image = (large[:, 1] - small[:, 1]) // (many - few)
    fixed = small[:, 1] - an_image * few

    def alive(sizes, kind):
        return np.cumsum(sizes * (small[:, 0] == kind))

    return Timeline(fixed=alive(fixed, ACTIVATION), an_image=alive(an_image, ACTIVATION), copies=alive(fixed, COPY),
                    gradients=alive(fixed, GRADIENT))


class AllocationTracker(TorchDispatchMode):
    """Notes when the memory of tensors is taken and given back.

    events  (number of the memory, bytes), the same with bytes below 0 where it is given back
    copies  numbers of what was copied from known tensors in another type

    Values of fake tensors do not exist; where the code asks for one it gets 1, or False.
    """

    def __init__(self):
        super().__init__()
        self.events, self.copies, self.known, self.alive = [], set(), {}, {}

    def know(self, tensors):
        """What is there already is not counted."""
        self.known |= {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    def numbers(self, tensors):
        """Of the memory of these tensors, where it was noted."""
        return {self.alive[id(tensor.untyped_storage())] for tensor in tensors
                if id(tensor.untyped_storage()) in self.alive}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is not torch.bool
        result = function(*args, **(kwargs or {}))
        is_copy = function is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self.known
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), is_copy)
        return result

    def _note(self, storage, is_copy):
        key, number, size = id(storage), len(self.events), storage.nbytes()
        if key in self.known or key in self.alive:
            return
        self.alive[key] = number
        self.events.append((number, size))
        if is_copy:
            self.copies.add(number)
        weakref.finalize(storage, self._forget, key, number, size)

    def _forget(self, key, number, size):
        del self.alive[key]
        self.events.append((number, -size))
