"""A lower bound of the memory that a run takes, known before anything of it is allocated."""
import models
from common import distributed
from common.resources import check_memory

BLOCK_OBJECTS = 2e4  # bytes of Python objects per block and copy
STORED_LAYERS = 8    # activations of the width of the network that each block stores for the backward pass, at least


def check_run_memory(flags, device, num_tokens=0, sample_numel=0):
    """Raise an `ArgumentError` about the largest part of a run if this machine cannot hold the run.

    Args:
        flags (Namespace): Flags of train.py.
        device (torch.device): Device of this rank.
        num_tokens (int): Tokens per image. Default: not known yet, and not counted.
        sample_numel (int): Numbers in the latents of an image.
    """
    sizes = models.DiT_models[flags.model].keywords
    width, depth = flags.hidden_size or sizes["hidden_size"], flags.depth or sizes["depth"]
    world_size = distributed.world_size()
    averages = len(flags.ema_decay)
    per_weight = 4 * (4 + averages) / (world_size if flags.fsdp else 1)  # weights, gradients, two moments, averages
    rows = flags.global_batch_size / (world_size * flags.grad_accum_steps)
    activations = depth * (1 + (STORED_LAYERS - 1) * (1 - flags.grad_checkpointing))
    needs = {
        ("num_classes",): flags.num_classes * width * per_weight,
        ("depth", "hidden_size", "model"): depth * (12 * width**2 * per_weight + BLOCK_OBJECTS * (1 + averages)),
        ("image_size", "patch_size"): 4 * num_tokens * width * (1 + averages),
        ("global_batch_size", "image_size"): (4 * flags.global_batch_size * sample_numel
                                              + 2 * rows * num_tokens * width * activations)}
    names = max(needs, key=needs.get)
    typed = [name for name in names[:2] if getattr(flags, name) is not None] or names[-1:]
    processes = 1 if device.type == "cuda" else distributed.local_world_size()
    check_memory(processes * sum(needs.values()), device, **{name: getattr(flags, name) for name in typed})
