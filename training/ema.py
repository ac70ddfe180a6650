"""Exponential moving averages of the weights; all published results use them."""
import copy
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training import fsdp
from training.fsdp import to_local


class EMA:
    """A model whose trained parameters follow those of another: ema = decay * ema + (1 - decay) * new.

    It starts as an exact copy. Untrained parameters and buffers are copied at every update.

    Args:
        model (DiT): The model to follow, before it is sharded.
        decay (float): In [0, 1); 0 keeps the weights themselves.

    Attributes:
        model (DiT): The average; sharded if the trained model is.
        full_model (DiT): The module to sample from within `full()`; `model` itself unless that is sharded.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.full_model = self.model
        self.decay = decay
        self._average = get_ema_multi_avg_fn(decay)

    def shard(self, mesh):
        """Keep one shard of the average per rank, as of the model that it follows."""
        self.full_model = copy.deepcopy(self.model).to("meta")
        fsdp.shard_model(self.model, mesh)

    @contextmanager
    def full(self):
        """Give `full_model` all weights during the block. Called by all ranks."""
        if self.full_model is self.model:
            yield self.model
            return
        fsdp.load_full_weights(self.full_model, self.model)
        try:
            yield self.full_model
        finally:
            self.full_model.to("meta")

    @torch.no_grad()
    def update(self, model, weight=None):
        """Move the average towards the weights of `model`, all of them in one call.

        Args:
            model (DiT): The model that is followed.
            weight (Tensor): Scalar on the device, 1 or 0: whether to move. Default: move.
        """
        pairs = list(zip(self.model.parameters(), model.parameters()))
        averages = [to_local(average) for average, new in pairs if new.requires_grad]
        weights = [to_local(new.detach()) for _, new in pairs if new.requires_grad]
        if weight is None:
            self._average(averages, weights, None)
        else:
            torch._foreach_lerp_(averages, weights, [weight * (1 - self.decay)] * len(averages))
        fixed = [(average, new) for average, new in pairs if not new.requires_grad]
        for average, new in (*fixed, *zip(self.model.buffers(), model.buffers())):
            to_local(average).copy_(to_local(new))
