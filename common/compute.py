"""How the network is computed: precision, compilation, attention kernels. The results differ by rounding alone."""

import contextlib
import copy
import ctypes
from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION}
ATTENTION_CHOICES = ("auto", *ATTENTION_KERNELS, "math")


@dataclass(frozen=True)
class ComputeConfig:
    """What the flags of speed say.

    precision    "fp32"; "tf32": matrix products of float32 in TF32 where the GPU has it, as published; "bf16": the
                 network in bfloat16 by autocast, its weights, the timestep embedding and all around it in float32
    compile      compile the network with torch.compile
    attention    "auto"; one of torch's kernels: flash, cudnn, efficient; or "math": two matrix products and a softmax,
                 which a compiler can see into
    cuda_graphs  launch all kernels of a pass at once, as the compiler records them: for models so small that launching
                 takes longer than computing
    """

    precision: str = "tf32"
    compile: bool = False
    attention: str = "auto"
    cuda_graphs: bool = False

    def set_up(self, model, by_block=False):
        """Make a DiT ready, in place, to be computed so; its weights keep their names. Nothing is compiled before its
        first call.

        by_block  compile each block by itself, so that DDP can send the gradients of one while the next is computed
        """
        if self.attention == "math":  # of self-attention; that to two embeddings (cross-attention) is left alone
            for module in model.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False
        if self.compile:
            torch._dynamo.config.optimize_ddp = not by_block  # which would cut the blocks again, to pieces of 25 MB
            for module in model.blocks if by_block else [model]:
                module.compile(dynamic=False, options=self._compiler_options())
        if self != DEFAULT_COMPUTE and next(model.parameters()).device.type == "cpu":
            retain_freed_memory()

    def of(self, network):
        """A callable like `network`, computed so; its output is float32."""
        def computed(x, *args, **more):
            if self.cuda_graphs:  # what the pass before put out may be overwritten from here on
                torch.compiler.cudagraph_mark_step_begin()
            with self._autocast(x.device.type), self.kernels():
                return network(x, *args, **more).float()
        return computed

    def _compiler_options(self):
        """What the compiler is told: that on CPUs tanh by the exponential function is twice as fast."""
        known = torch._inductor.list_options()
        options = {"triton.cudagraphs": self.cuda_graphs, "cpp.use_decompose_tanh": True}
        return {name: value for name, value in options.items() if name in known}

    def _autocast(self, kind):
        return torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def kernels(self):
        """The block in which attention has its kernel: around the backward pass too, where activations are computed
        again.
        """
        return sdpa_kernel(ATTENTION_KERNELS[self.attention]) if self.attention in ATTENTION_KERNELS else contextlib.nullcontext()

    def check(self, device):
        """A `UserError` where this device knows no such precision or kernel."""
        kind = torch.device(device).type
        if self.precision == "bf16" and not torch.amp.is_autocast_available(kind):
            raise UserError(f"--precision bf16: torch has no autocast on {kind}")
        if self.cuda_graphs and not (kind == "cuda" and self.compile):
            raise UserError("--cuda-graphs needs a GPU, and --compile: it is the compiler that records them; this is "
                            f"{kind}, {'with' if self.compile else 'without'} --compile")
        if self.attention not in ATTENTION_KERNELS:
            return
        probe = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16 if self.precision == "bf16" else None)
        try:
            with sdpa_kernel(ATTENTION_KERNELS[self.attention]):
                torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            raise UserError(f"--attention {self.attention}: torch has no such kernel for {self.precision} on {kind}; "
                            "take --attention auto") from None


DEFAULT_COMPUTE = ComputeConfig()


def fastest_config(device):
    """What --fast means on this device."""
    kind = torch.device(device).type
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = kind == "cpu" and cpu_has_bf16()
    # The backward pass of the CPU's flash kernel takes five times as long as the products (docs/performance.md).
    return ComputeConfig("bf16" if has_bf16 else "tf32", compile=True, attention="math" if kind == "cpu" else "auto")


def local_device_type():
    """Return the type of device that this machine computes on: "cuda", "mps", "xpu" or "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def cpu_has_bf16():
    """Whether the CPU multiplies in bfloat16; where it must emulate that, it is slower than float32."""
    knows = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not say
    return bool(knows.get("avx512_bf16") or knows.get("amx_bf16"))


def retain_freed_memory():
    """Tell the C library to keep large blocks that are freed: otherwise it gives those of a step's activations back to
    the system, which hands them out again at the next step page by page, each one zeroed. Without effect elsewhere.
    """
    trim_threshold, mmap_threshold, largest = -1, -3, 32 << 20  # of malloc.h; mallopt takes no larger threshold
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Bf16InferenceModel:
    """A DiT for sampling whose weights are rounded to bfloat16 once a batch of images, where autocast would do it at
    every step. It computes the same: only linear layers and convolutions hold rounded weights, and the timestep
    embedding keeps its own.
    """

    def __init__(self, model, compute):
        self.source = model
        self.model = copy.deepcopy(model)
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("t_embedder."):
                module.to(torch.bfloat16)
        compute.set_up(self.model)

    @torch.no_grad()
    def __call__(self):
        """The model, with the weights that its source has now."""
        for ours, new in zip(self.model.parameters(), self.source.parameters()):
            ours.copy_(new)
        return self.model


def find_compiler_error(device):
    """Why torch.compile does not work on this device, in a line; None where it does. Tries it on a small function."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sin())(torch.ones(64, device=device))
    except Exception as error:  # each part of the tool chain fails in a way of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None
