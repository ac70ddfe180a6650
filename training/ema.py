"""Exponential moving averages of the weights; all published results use them."""
import copy
from contextlib import contextmanager

import torch

from common.state_dicts import describe_young_average
from training import fsdp
from training.fsdp import to_local


class EMA:
    """A model whose trained parameters follow those of another: ema = decay * ema + (1 - decay) * new.

    It starts as an exact copy. Untrained parameters and buffers are copied at every update.

    Args:
        model (DiT): The model to follow, before it is sharded.
        decay (float): In [0, 1); 0 keeps the weights themselves.
        warmup (bool): Let the decay of step k = 0, 1, ... be min(decay, (1 + k) / (10 + k)), so that the initial
            weights lose their share within the first steps. A function of the step alone: a resumed run continues it.

    Attributes:
        model (DiT): The average; sharded if the trained model is.
        full_model (DiT): The module to sample from within `full()`; `model` itself unless that is sharded.
    """

    def __init__(self, model, decay, warmup=False):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.full_model = self.model
        self.decay, self.warmup = decay, warmup

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
    def update(self, model, weight=None, step=0):
        """Move the average towards the weights of `model`.

        Args:
            model (DiT): The model that is followed.
            weight (Tensor): Scalar on the device, 1 or 0: whether to move. Default: move.
            step (int): Number of steps before this one, for the warmup.
        """
        pairs = list(zip(self.model.parameters(), model.parameters()))
        averages = [to_local(average) for average, new in pairs if new.requires_grad]
        weights = [to_local(new.detach()) for _, new in pairs if new.requires_grad]
        rate = 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)
        # With a factor on the device this is one kernel per weight: for one call torch wants factors of their shapes.
        torch._foreach_lerp_(averages, weights, rate if weight is None else [weight * rate] * len(averages))
        fixed = [(average, new) for average, new in pairs if not new.requires_grad]
        for average, new in (*fixed, *zip(self.model.buffers(), model.buffers())):
            to_local(average).copy_(to_local(new))

    def describe_start(self, step):
        """Return a warning if the average after `step` steps is still mostly its initial weights, otherwise None."""
        doubt = None if self.warmup else describe_young_average(self.decay, step)
        return doubt and (f"WARNING: {doubt}, which its samples show. --ema-warmup or a lower --ema-decay reduce this "
                          "share faster; --weights model of sample.py samples the raw weights")
