"""Rows that say where the milliseconds go: torch's profiler, by class of kernel."""
import collections
import re
import time

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.sampling import build_sampler
from benchmarks.gpu.training import build_step, matmul_precision
from benchmarks.timing import wait_and_read_clock

# The first pattern that a kernel's name has decides. On a CPU the names are torch's operators.
CLASSES = {
    "communication": r"nccl",
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated_fort|_softmax",
    "matrix products": r"gemm|nvjet|cublas|cutlass|xmma|wgmma|splitk|::mm|addmm|::bmm|convolution|conv2d|mkldnn",
    "optimizer and EMA": r"multi_tensor|fused_adam|foreach|lerp|adamw",
    "copies": r"memcpy|memset|copy_|::to\b|_to_copy|::clone|::cat|catarray",
    "pointwise, norms, sums": r"triton|elementwise|layer_norm|reduce|vectorized|aten::",
}
NUM_KERNELS = 15  # named in a row


def profile_training(scale, calls=5, **options):
    """Profile training steps; see `profile_calls`."""
    options["batch"] = scale.batch(options.get("batch", 256))
    with matmul_precision(scale, "tf32"):
        step = build_step(scale, **options)[0]
        return profile_calls(scale, step, scale.count(5), scale.count(calls)) | dict(batch=options["batch"])


def profile_sampling(scale, steps="20", **options):
    """Profile the steps of a sampling loop; see `profile_calls`. Milliseconds are those of a step."""
    with matmul_precision(scale, "tf32"):
        sample, pipeline = build_sampler(scale, steps="3" if scale.is_tiny else steps, **options)
        row = profile_calls(scale, sample, 1, 1)
    count = pipeline.diffusion.num_timesteps
    row["milliseconds"] = {name: value / count for name, value in row["milliseconds"].items()}
    row["kernels"] = [[name, value / count] for name, value in row["kernels"]]
    return row | dict(total_ms=row["total_ms"] / count, steps=count)


def profile_calls(scale, function, warm_up, calls):
    """Return the milliseconds of a call by class of kernel.

    Returns:
        dict: total_ms, by the clock; milliseconds, {class: milliseconds}, on a GPU with "idle", in which no kernel
        runs; kernels, pairs (name, milliseconds) of those that take longest.
    """
    for _ in range(warm_up):
        function()
    wait_and_read_clock()
    with profile(activities=[ProfilerActivity.CUDA if scale.is_cuda else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        total_ms = 1e3 * (wait_and_read_clock() - start) / calls
    by_kernel, spans = collections.Counter(), []
    for event in profiler.events():
        if scale.is_cuda and event.device_type == DeviceType.CUDA:
            by_kernel[event.name] += event.time_range.elapsed_us() / 1e3 / calls
            spans.append((event.time_range.start, event.time_range.end))
        elif not scale.is_cuda:
            by_kernel[event.name] += event.self_cpu_time_total / 1e3 / calls
    by_class = collections.Counter()
    for name, milliseconds in by_kernel.items():
        by_class[classify(name)] += milliseconds
    if scale.is_cuda:
        by_class["idle"] = max(0.0, total_ms - busy_us(spans) / 1e3 / calls)
    kernels = [[name[:120], value] for name, value in by_kernel.most_common(NUM_KERNELS)]
    return dict(total_ms=total_ms, milliseconds=dict(by_class.most_common()), kernels=kernels)


def classify(name):
    """Return the class of a kernel, by its name."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name.lower())), "other")


def busy_us(spans):
    """Return the length of the union of intervals (start, end)."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


