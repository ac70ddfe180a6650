"""Block types of a DiT other than adaLN-Zero: the other three of the paper (section 3.2), and adaLN-single of PixArt.

To add one, write what differs, name it in a subclass of `DiT`, and append the subclass to CONDITIONINGS:

    class GatedDiT(DiT):
        conditioning = "gated"                     # --conditioning gated; stored in checkpoints
        conditioning_class = AdaLNConditioning     # (x, t, y) -> tokens, condition of the blocks, of the final layer
        block_class = GatedBlock                   # (x, c) -> x
        final_layer_class = FinalLayer             # (x, c) -> patches

Lines that are left out inherit adaLN-Zero. A layer that starts at zero is a `ZeroInitLinear`; other starting weights
are set in `initialize_weights`. Weights without a configuration are recognized by the names and shapes of a block, so
a new type should have its own. tests/unit/test_block_types.py has tables of what each type costs and starts from.
"""
import torch
from timm.layers import Attention, Mlp
from torch import nn

from models import (
    AdaLNConditioning,
    DiT,
    DiTBlock,
    FinalLayer,
    ZeroInitLinear,
    ZeroInitModulation,
    layer_norm,
    modulate,
)

# ---------------------------------------------------------------- in-context: t and y are two more tokens


class InContextConditioning(AdaLNConditioning):
    """Append the embeddings of t and y to the tokens; they have no positions."""

    def forward(self, x, t, y):
        """Return the tokens (N, T + 2, D); nothing else depends on t and y."""
        return torch.cat([x, torch.stack([t, y], dim=1)], dim=1), None, None


class ViTBlock(nn.Module):
    """The plain block of a vision transformer."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **block_kwargs):
        super().__init__()
        self.norm1 = layer_norm(hidden_size, affine=True)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True, **block_kwargs)
        self.norm2 = layer_norm(hidden_size, affine=True)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))

    def forward(self, x, c):
        """Transform tokens x (N, T, D); c is None."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainFinalLayer(nn.Module):
    """Decode tokens to patches without a condition."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = layer_norm(hidden_size, affine=True)
        self.linear = ZeroInitLinear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x, c):
        """Decode tokens x (N, T, D) to patches (N, T, p * p * out_channels); c is None."""
        return self.linear(self.norm_final(x))


class InContextFinalLayer(PlainFinalLayer):
    """Drop the two tokens of t and y, then decode."""

    def forward(self, x, c):
        """Decode tokens x (N, T + 2, D) to patches (N, T, p * p * out_channels); c is None."""
        return super().forward(x[:, :-2], c)


class InContextDiT(DiT):
    """DiT with in-context conditioning."""

    conditioning = "in-context"
    conditioning_class, block_class, final_layer_class = InContextConditioning, ViTBlock, InContextFinalLayer


# ---------------------------------------------------------------- cross-attention: tokens attend to t and y

class CrossAttentionConditioning(AdaLNConditioning):
    """Give the blocks the embeddings of t and y as a sequence of two."""

    def forward(self, x, t, y):
        """Return the tokens, and the sequence (N, 2, D) for the blocks."""
        return x, torch.stack([t, y], dim=1), None


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to another sequence; `fused_attn` as of timm's `Attention`."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads, self.fused_attn = num_heads, True
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, c):
        """Attend from tokens x (N, T, D) to the sequence c (N, S, D): (N, T, D)."""
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T or S, D / heads)
                   for part in (self.q(x), *self.kv(c).chunk(2, dim=2)))
        if self.fused_attn:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1]**-0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttentionBlock(ViTBlock):
    """A ViT block with cross-attention between self-attention and MLP."""

    def __init__(self, hidden_size, num_heads, *args, **kwargs):
        super().__init__(hidden_size, num_heads, *args, **kwargs)
        self.norm_cross = layer_norm(hidden_size, affine=True)
        self.cross_attn = CrossAttention(hidden_size, num_heads)

    def forward(self, x, c):
        """Transform tokens x (N, T, D), attending to the embeddings c (N, 2, D)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class CrossAttentionDiT(DiT):
    """DiT with cross-attention to timestep and class."""

    conditioning = "cross-attention"
    conditioning_class = CrossAttentionConditioning
    block_class, final_layer_class = CrossAttentionBlock, PlainFinalLayer


# ---------------------------------------------------------------- adaLN: shift and scale, without gates

class AdaLNModulation(nn.Sequential):
    """Map a condition (N, D) to `chunks` vectors of width D: (N, chunks * D)."""

    def __init__(self, hidden_size, chunks):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class AdaLNBlock(DiTBlock):
    """A block with shift and scale from the condition; it does not start as the identity."""

    modulation_class, num_modulations = AdaLNModulation, 4

    def forward(self, x, c):
        """Transform tokens x (N, T, D) under the condition c (N, D)."""
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNFinalLayer(FinalLayer):
    """A final layer of which only the output is zero at the start."""

    modulation_class = AdaLNModulation


class AdaLNDiT(DiT):
    """DiT with adaLN."""

    conditioning = "adaln"
    block_class, final_layer_class = AdaLNBlock, AdaLNFinalLayer


# ---------------------------------------------------------------- adaLN-single (Chen et al., "PixArt-alpha", 2023)

class AdaLNSingleConditioning(AdaLNConditioning):
    """Compute the six modulation vectors once for all blocks."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.adaLN_modulation = ZeroInitModulation(hidden_size, 6)

    def forward(self, x, t, y):
        """Return the tokens, the vectors (N, 6D) for the blocks, and the sum (N, D) for the final layer."""
        c = t + y
        return x, self.adaLN_modulation(c), c


class ScaleShiftTable(nn.Module):
    """Add learned vectors to modulation vectors that are shared by all blocks, c (N, chunks * D) or (N, D)."""

    def __init__(self, hidden_size, chunks):
        super().__init__()
        self.table = nn.Parameter(torch.empty(chunks, hidden_size))

    def forward(self, c):
        """Return the modulation vectors (N, chunks * D)."""
        return (c.unflatten(1, (-1, self.table.shape[1])) + self.table).flatten(1)


class AdaLNSingleBlock(DiTBlock):
    """An adaLN-Zero block with a table in place of its linear layer."""

    modulation_class = ScaleShiftTable


class AdaLNSingleFinalLayer(FinalLayer):
    """A final layer with a table in place of its linear layer."""

    modulation_class = ScaleShiftTable


class AdaLNSingleDiT(DiT):
    """DiT with adaLN-single."""

    conditioning = "adaln-single"
    conditioning_class = AdaLNSingleConditioning
    block_class, final_layer_class = AdaLNSingleBlock, AdaLNSingleFinalLayer

    def initialize_weights(self):
        """Set the tables to N(0, 1 / D), as PixArt does, but close the gates: it started from trained weights."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, ScaleShiftTable):
                nn.init.normal_(module.table, std=self.config.hidden_size**-0.5)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation.table[2::3])


CONDITIONINGS = {model_class.conditioning: model_class
                 for model_class in (DiT, AdaLNDiT, InContextDiT, CrossAttentionDiT, AdaLNSingleDiT)}
