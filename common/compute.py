"""How the network is computed: precision, compilation, attention kernels. The results differ by rounding alone."""
import contextlib
import copy
import ctypes
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import ArgumentError

PRECISIONS = ("fp32", "tf32", "bf16")
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                     "efficient": SDPBackend.EFFICIENT_ATTENTION}
ATTENTION_CHOICES = ("auto", *ATTENTION_KERNELS, "math")


@dataclass(frozen=True)
class ComputeConfig:
    """Precision, compilation and attention kernel of a network.

    Attributes:
        precision (str): "fp32"; "tf32": float32 with TF32 matrix products on GPUs that have them, as published; or
            "bf16": the network by autocast, with weights, timestep embedding and output in float32.
        compile (bool): Compile the blocks with torch.compile.
        attention (str): "auto"; a kernel of torch: "flash", "cudnn" or "efficient"; or "math": two matrix products
            and a softmax, which a compiler can fuse.
        cuda_graphs (bool): Launch all kernels of a pass at once, as recorded by the compiler: for models so small
            that launching takes longer than computing.
    """

    precision: str = "tf32"
    compile: bool = False
    attention: str = "auto"
    cuda_graphs: bool = False

    def prepare(self, model):
        """Prepare a DiT in place, keeping the names of its weights. Compilation happens at its first call.

        A block is compiled once, for all blocks: a deep network compiles as fast as a shallow one, and DDP sends the
        gradients of one block while those of the next are computed. CUDA graphs need the network in one piece.
        """
        if self.attention == "math":
            for module in model.modules():
                if hasattr(module, "fused_attn"):  # timm's self-attention, our cross-attention
                    module.fused_attn = False
        if self.compile:
            torch._dynamo.config.optimize_ddp = False  # it would cut the blocks again, into buckets of 25 MB
            for module in [model] if self.cuda_graphs else model.blocks:
                module.compile(dynamic=False, options=self.compiler_options())
        if self != DEFAULT_COMPUTE and next(model.parameters()).device.type == "cpu":
            retain_freed_memory()

    def wrap(self, network):
        """Return a callable like `network` that computes in this precision with this kernel; its output is float32."""
        def wrapped(x, *args, **kwargs):
            if self.cuda_graphs:  # outputs of the previous pass may be overwritten from here on
                torch.compiler.cudagraph_mark_step_begin()
            with self._autocast(x.device.type), self.attention_kernel():
                return network(x, *args, **kwargs).float()
        return wrapped

    def attention_kernel(self):
        """Return a context that selects the kernel. With activation checkpointing, the backward pass needs it too."""
        kernel = ATTENTION_KERNELS.get(self.attention)
        return sdpa_kernel(kernel) if kernel else contextlib.nullcontext()

    def _autocast(self, device_type):
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def compiler_options(self):
        """Return the options of torch.compile; on CPUs, tanh by the exponential function is twice as fast."""
        options = {"triton.cudagraphs": self.cuda_graphs, "cpp.use_decompose_tanh": True}
        return {name: value for name, value in options.items() if name in torch._inductor.list_options()}

    def check(self, device):
        """Raise an `ArgumentError` if this device does not support the precision, the kernel or CUDA graphs."""
        device_type = torch.device(device).type
        if self.precision == "bf16" and not torch.amp.is_autocast_available(device_type):
            raise ArgumentError(f"torch has no autocast on {device_type}. Choose tf32 or fp32.", precision="bf16")
        if self.cuda_graphs and not (device_type == "cuda" and self.compile):
            raise ArgumentError(f"CUDA graphs need a GPU and compilation, but the device is {device_type} and "
                                f"compilation is {'on' if self.compile else 'off'}.", cuda_graphs=True)
        if self.attention not in ATTENTION_KERNELS:
            return
        probe = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16 if self.precision == "bf16" else None)
        try:
            with self.attention_kernel():
                torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            raise ArgumentError(f"torch has no such kernel for {self.precision} on {device_type}. Choose auto.",
                                attention=self.attention) from None


DEFAULT_COMPUTE = ComputeConfig()


def fastest_config(device):
    """Return the `ComputeConfig` of --fast on this device."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device_type == "cpu" and cpu_has_bf16()
    # On CPUs the backward pass of the flash kernel takes five times as long as the products (docs/performance.md).
    return ComputeConfig("bf16" if has_bf16 else "tf32", compile=True,
                         attention="math" if device_type == "cpu" else "auto")


def share_weights(model):
    """Return a copy of a DiT that shares its weights, but whose blocks are compiled independently."""
    shared = copy.copy(model)
    shared._modules = dict(model._modules) | dict(blocks=nn.ModuleList(copy.copy(block) for block in model.blocks))
    return shared


def local_device_type():
    """Return the type of device that `distributed.init` will choose: "cuda", "mps", "xpu" or "cpu"."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and torch.backends.mps.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def cpu_has_bf16():
    """Return whether the CPU multiplies in bfloat16; emulated, it is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def retain_freed_memory():
    """Let glibc keep large freed blocks; without glibc, do nothing.

    By default it returns the activations of a step to the system, which zeroes them page by page at the next step.
    """
    # Parameters of mallopt (malloc.h); it takes no larger mmap threshold than 32 MB.
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Bf16InferenceModel:
    """Copy of a DiT with weights in bfloat16: rounded once per batch of images, not at every step as by autocast.

    The results are those of autocast: only linear layers and convolutions hold rounded weights, and the timestep
    embedding stays in float32.
    """

    def __init__(self, model, compute):
        self.source = model
        self.model = copy.deepcopy(model)
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("t_embedder."):
                module.to(torch.bfloat16)
        compute.prepare(self.model)

    @torch.no_grad()
    def __call__(self):
        """Return the copy, updated with the present weights of its source."""
        for rounded, weight in zip(self.model.parameters(), self.source.parameters()):
            rounded.copy_(weight)
        return self.model


def find_compiler_error(device):
    """Compile a small function with torch.compile and return the first line of its error, or None if it works."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sin())(torch.ones(64, device=device))
    except Exception as error:  # each part of the tool chain has errors of its own types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None
