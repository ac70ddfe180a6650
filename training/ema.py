"""The moving average of the weights that the paper samples from."""

import copy
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.fsdp import load_full_weights, shard_model, to_local


class EMA:
    """A model whose trained parameters follow another's: ema = decay ema + (1 - decay) new, one call for all.

    Starts as an exact copy. Parameters that are not trained, and buffers, are copied.
    model    the average; sharded where the trained model is
    sampled  the module to sample from, within `whole()`: the average itself, or one that is whole there only
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.sampled = self.model
        self.decay, self.average = decay, get_ema_multi_avg_fn(decay)

    def shard(self, mesh):
        """Keep a part of the average in each process, as of the model that it follows."""
        self.sampled = copy.deepcopy(self.model).to("meta")
        shard_model(self.model, mesh)

    @contextmanager
    def whole(self):
        """A block in which `sampled` has all its weights. To be called by all processes."""
        if self.sampled is self.model:
            yield self.model
            return
        load_full_weights(self.sampled, self.model)
        try:
            yield self.sampled
        finally:
            self.sampled.to("meta")

    @torch.no_grad()
    def update(self, model, weight=None):
        """Move towards `model`, which must be of the same class.

        weight  0 or 1 on the device: by so much of the usual way. None: 1
        """
        pairs = list(zip(self.model.parameters(), model.parameters()))
        trained = [(ours, new) for ours, new in pairs if new.requires_grad]
        ours, new = [to_local(ours) for ours, _ in trained], [to_local(new.detach()) for _, new in trained]
        if weight is None:
            self.average(ours, new, None)
        else:
            torch._foreach_lerp_(ours, new, [weight * (1 - self.decay)] * len(ours))
        fixed = [(ours, new) for ours, new in pairs if not new.requires_grad]
        for ours, new in fixed + list(zip(self.model.buffers(), model.buffers())):
            to_local(ours).copy_(to_local(new))
