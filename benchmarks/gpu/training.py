"""Rows of training: throughput, memory against the planner, and the largest batch that fits."""
import contextlib
from dataclasses import replace

import torch
from torch import nn

from benchmarks.gpu.row import NotOnThisDevice
from benchmarks.timing import summarize_times, time_alone
from benchmarks.train import OurStep, PublishedStep
from common.compute import DEFAULT_COMPUTE, fastest_config
from common.errors import ArgumentError
from common.flops import count_multiply_adds, peak_flops, training_step_flops
from tools.memory import estimate_step_memory

FAST = "fast"  # the setting that takes the fields of --fast


def choose_compute(scale, base, changes):
    """Return the `ComputeConfig` of --fast, or of no flags, with changed fields.

    Raises:
        NotOnThisDevice: If the device or this torch lacks one of them.
    """
    config = fastest_config(scale.device) if base == FAST else DEFAULT_COMPUTE
    if changes.get("attention") in ("flash", "cudnn"):
        scale.need_gpu("this kernel")
    if changes.get("cuda_graphs"):
        scale.need_gpu("--cuda-graphs")
    config = scale.compute(replace(config, **changes), compiles="compile" in changes)
    try:
        config.check(scale.device)
    except ArgumentError as error:
        raise NotOnThisDevice(str(error)) from None
    return config


def build_step(scale, model, batch, base=FAST, fused=True, whole=False, checkpointed=0.0, **changes):
    """Return a training step on random latents, () -> None, and the network.

    Args:
        scale (Scale): Device and size.
        model (str): A name of `DiT_models`.
        batch (int): Images per step, after `Scale.batch`.
        base (str): "published": the baseline; "plain": train.py without flags; "fast": train.py --fast.
        fused (bool): Fused AdamW.
        whole (bool): Compile the whole network in one graph, instead of a block for all.
        checkpointed (float): Share of the blocks that recompute their activations.
        **changes: Fields of `ComputeConfig`.
    """
    network = scale.network(model).train()
    network.checkpointed = checkpointed
    if base == "published":
        step = PublishedStep(network, scale.device)
    else:
        compute = choose_compute(scale, base, changes)
        step = OurStep(network, scale.device, batch, replace(compute, compile=False) if whole else compute, fused)
        if whole and compute.compile:
            network.compile(dynamic=False)
    images = torch.randn(batch, *network.sample_shape, device=scale.device)
    labels = torch.randint(0, 1000, (batch,), device=scale.device)
    return (lambda: step(images, labels)), network, step


@contextlib.contextmanager
def matmul_precision(scale, precision):
    """Compute float32 products in TF32 or not, as the commands do."""
    if scale.is_cuda:
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    yield


def measure_throughput(scale, model="DiT-XL/2", batch=256, inductor=None, **options):
    """Return seconds a step, images a second, MFU and peak memory; `inductor` holds options of the compiler."""
    batch = scale.batch(batch)
    context = torch._inductor.config.patch(inductor) if inductor else contextlib.nullcontext()
    with context, matmul_precision(scale, "tf32"):
        row = time_alone(lambda: build_step(scale, model, batch, **options)[0], scale.count(6), 3, scale.count(6))
    row |= summarize_times(row.pop("times")) | dict(batch=batch)
    row["images_per_second"] = batch / row["seconds"]
    with torch.device("meta"):
        flops = training_step_flops(count_multiply_adds(scale.build(model)()), batch)
    precision = "tf32" if options.get("base", FAST) != FAST else fastest_config(scale.device).precision
    if peak := peak_flops(scale.device, options.get("precision", precision)):
        row["mfu"] = flops / row["seconds"] / peak
    return row


def measure_optimizer(scale, model="DiT-XL/2", kind="fused"):
    """Return the milliseconds of an AdamW step alone: "fused", "foreach" or "for-loop"."""
    network = scale.network(model)
    flags = {"fused": dict(fused=True), "foreach": dict(foreach=True), "for-loop": dict(foreach=False)}[kind]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0, **flags)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn_like(weight)
    row = time_alone(lambda: optimizer.step, 3, 3, scale.count(20))
    return dict(milliseconds=1e3 * summarize_times(row["times"])["seconds"])


def measure_ema(scale, model="DiT-XL/2", decided="host"):
    """Return the milliseconds of an update of the EMA, if the host or the device decides on bad steps."""
    from training.ema import EMA

    network = scale.network(model)
    ema, weight = EMA(network, 0.9999), torch.ones((), device=scale.device) if decided == "device" else None
    row = time_alone(lambda: lambda: ema.update(network, weight), 3, 3, scale.count(20))
    return dict(milliseconds=1e3 * summarize_times(row["times"])["seconds"])


def predict_memory(scale, model, batch, checkpointed=0.0, fused=True, precision="bf16"):
    """Return what `tools.plan` predicts for a step, in bytes, and its `MemoryEstimate`."""
    with torch.device("cpu"):
        estimate = estimate_step_memory(scale.build(model), replace(DEFAULT_COMPUTE, precision=precision),
                                        checkpointed, fused=fused)
    return estimate.peak(batch), estimate


def measure_memory(scale, model="DiT-XL/2", batch=64, checkpointed=0.0, precision="bf16", compile=False, fused=True):
    """Return the predicted and the measured peak of a training step, in GB."""
    batch = scale.batch(batch)
    predicted, _ = predict_memory(scale, model, batch, checkpointed, fused, precision)
    row = dict(batch=batch, predicted_gb=predicted / 1e9)
    step = build_step(scale, model, batch, "plain", fused, checkpointed=checkpointed, precision=precision,
                      **(dict(compile=True) if compile else {}))[0]
    if scale.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    if scale.is_cuda:
        row["measured_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["ratio"] = row["measured_gb"] / row["predicted_gb"]
    return row


def find_largest_batch(scale, model="DiT-XL/2", checkpointed=0.0, compile=False, stride=16, tries=5):
    """Return the largest batch whose step fits, in multiples of `stride`; the search starts at the prediction."""
    _, estimate = predict_memory(scale, model, 1, checkpointed)
    memory = torch.cuda.mem_get_info()[0] if scale.is_cuda else 2 * estimate.peak(2 * stride)
    predicted = estimate.largest_batch(memory)
    if predicted < stride:
        raise NotOnThisDevice(f"fewer than {stride} images fit")
    options = dict(base="plain", checkpointed=checkpointed, precision="bf16", **(dict(compile=True) if compile else {}))
    batch, fitting, failing = predicted // stride * stride, None, None
    for _ in range(scale.count(tries)):
        if _fits(scale, model, batch, options):
            fitting, batch = batch, batch + stride
        else:
            failing, batch = batch, batch - stride
        if batch in (fitting, failing) or batch < stride:
            break
    return dict(predicted_batch=predicted, largest_batch=fitting, smallest_that_fails=failing)


def _fits(scale, model, batch, options):
    try:
        step = build_step(scale, model, batch, **options)[0]
        for _ in range(2):
            step()
        if scale.is_cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        step = None
        if scale.is_cuda:
            torch.cuda.empty_cache()
    return True


def randomize(network):
    """Give a network random weights, since zeros hide differences and paths; return it."""
    for weight in network.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.02)
    return network
