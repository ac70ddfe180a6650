"""How the network is computed: precision, compilation, attention kernels. The results differ by rounding alone."""
import contextlib
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Speed:
    """What the flags of speed say.

    precision  "fp32"; "tf32": matrix products of float32 in TF32 where the GPU has it, as published; "bf16": the
               network in bfloat16 by autocast, its weights, the timestep embedding and all around it in float32
    compile    compile the network with torch.compile
    attention  "auto", or the kernel: flash, cudnn, efficient, math
    """

    precision: str = "tf32"
    compile: bool = False
    attention: str = "auto"

    def of(self, network):
        """A callable like `network`, computed so; its output is float32."""
        def computed(x, *args, **more):
            with self._autocast(x.device.type), self.kernels():
                return network(x, *args, **more).float()
        return computed

    def _autocast(self, kind):
        return torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def kernels(self):
        """The block in which attention has its kernel: around the backward pass too, where activations are computed
        again.
        """
        return contextlib.nullcontext() if self.attention == "auto" else sdpa_kernel(KERNELS[self.attention])

    def check(self, device):
        """A `UserError` where this device knows no such precision or kernel."""
        kind = torch.device(device).type
        if self.precision == "bf16" and not torch.amp.is_autocast_available(kind):
            raise UserError(f"--precision bf16: torch has no autocast on {kind}")
        if self.attention == "auto":
            return
        probe = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16 if self.precision == "bf16" else None)
        try:
            with sdpa_kernel(KERNELS[self.attention]):
                torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            raise UserError(f"--attention {self.attention}: torch has no such kernel for {self.precision} on {kind}; "
                            "take --attention auto") from None


PLAIN = Speed()


def fastest(device):
    """What --fast means on this device."""
    kind = torch.device(device).type
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = kind == "cpu" and cpu_has_bf16()
    return Speed("bf16" if has_bf16 else "tf32", compile=True)


def cpu_has_bf16():
    """Whether the CPU multiplies in bfloat16; where it must emulate that, it is slower than float32."""
    knows = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not say
    return bool(knows.get("avx512_bf16") or knows.get("amx_bf16"))


def compile_network(model, by_block=False):
    """Compile a DiT in place: its weights keep their names. Nothing is compiled before its first call.

    by_block  each block by itself, so that DDP can send the gradients of one block while the next is computed
    """
    for module in model.blocks if by_block else [model]:
        module.compile(dynamic=False)


def why_no_compiler(device):
    """Why torch.compile does not work on this device, in a line; None where it does. Tries it on a small function."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sin())(torch.ones(64, device=device))
    except Exception as error:  # each part of the tool chain fails in a way of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None
