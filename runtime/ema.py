"""The moving average of the weights that the paper samples from."""
import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """A model whose trained parameters follow another's: ema = decay ema + (1 - decay) new, one call for all.

    Starts as an exact copy. Parameters that are not trained, and buffers, are copied.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model):
        """Move towards `model`, which must be of the same class."""
        pairs = list(zip(self.model.parameters(), model.parameters()))
        trained = [(ours, new) for ours, new in pairs if new.requires_grad]
        self.average([ours for ours, _ in trained], [new.detach() for _, new in trained], None)
        fixed = [(ours, new) for ours, new in pairs if not new.requires_grad]
        for ours, new in fixed + list(zip(self.model.buffers(), model.buffers())):
            ours.copy_(new)
