"""DiT: a vision transformer that denoises latents (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023).

Read from the bottom up for the whole picture, or in order: position table, embeddings, blocks, conditioning,
DiT, sizes. CONDITIONINGS is the table of the block types: the paper's four, of which adaLN-Zero won, and adaLN-single.
Shapes: N batch, C channels, H W latent height and width, p patch size, T tokens, D width.
"""
import contextlib
import math
import operator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from timm.layers import Attention, Mlp
except ImportError as error:
    import timm
    raise ImportError(f"timm {timm.__version__} has no timm.layers.Attention or timm.layers.Mlp; "
                      "install the version that requirements.txt names") from error


def modulate(x, shift, scale):
    """x (N, T, D) scaled and shifted per sample by scale, shift (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def as_pair(value, name):
    """An int or a pair of ints, both at least 1, as a pair (height, width)."""
    try:
        pair = tuple(map(operator.index, value if isinstance(value, (tuple, list)) else (value, value)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive integer or a pair of them (height, width), not {value!r}")
    return pair


# ---------------------------------------------------------------- positions

def get_2d_sincos_pos_embed(embed_dim, grid_size):
    """Fixed position table of a grid of tokens in row-major order.

    embed_dim  D, a multiple of 4: the first half of a row encodes the token's column, the second its row
    grid_size  tokens a side, or a pair (rows, columns)
    return     (T, D) float64 array
    """
    if embed_dim % 4:
        raise ValueError(f"a 2-D sine-cosine position table needs a width that is a multiple of 4, not {embed_dim}")
    rows, columns = as_pair(grid_size, "grid_size")
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return np.concatenate([_sincos(embed_dim // 2, column), _sincos(embed_dim // 2, row)], axis=1)


def _sincos(dim, position):
    """(T,) positions -> (T, dim): dim/2 sines, then dim/2 cosines (Vaswani et al., 2017, section 3.5)."""
    frequency = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))
    angle = np.outer(position, frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


# ---------------------------------------------------------------- embeddings

class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D): one token for each p x p patch, T = (H / p)(W / p) in row-major order."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        self.input_size = as_pair(input_size, "input_size")
        self.patch_size = as_pair(patch_size, "patch_size")
        if any(side % patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} cannot be cut in patches of patch_size {patch_size}")
        self.grid_size = tuple(side // patch_size for side in self.input_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        expected = (self.proj.in_channels, *self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"the model takes inputs of (channels, height, width) = {expected}, "
                             f"got {tuple(x.shape[1:])}")
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Diffusion timesteps (N,) -> (N, D): sinusoidal features, then an MLP."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Sinusoidal features of (possibly fractional) timesteps.

        t       (N,) integers or floats
        dim     number of features: dim // 2 cosines, then as many sines, and one zero if dim is odd
        return  (N, dim) float32
        """
        half = dim // 2
        frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return nn.functional.pad(features, (0, dim % 2))

    def forward(self, t):
        with full_precision(t.device.type):
            features = self.timestep_embedding(t, self.frequency_embedding_size)
            return self.mlp(features.to(self.mlp[0].weight.dtype))


def full_precision(kind):
    """A block that autocast leaves alone: 256 sines of a timestep need more than the 8 bits of bfloat16."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


class LabelEmbedder(nn.Module):
    """Class labels (N,) -> (N, D), with label dropout for classifier-free guidance.

    Labels are 0 .. num_classes - 1. With dropout_prob > 0 the table has one row more: the null class, num_classes.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], not {dropout_prob}")
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    @property
    def has_null_class(self):
        """Whether there is a class to guide away from."""
        return self.embedding_table.num_embeddings > self.num_classes

    def token_drop(self, labels, force_drop_ids=None):
        """Replace some labels by the null class: where force_drop_ids (N,) is 1, or else at random."""
        if not self.has_null_class:
            raise ValueError("this model was built with class_dropout_prob=0: it has no null class to drop labels to")
        if force_drop_ids is None:
            drop = torch.rand(len(labels), device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels, train, force_drop_ids=None):
        self._check(labels)
        if force_drop_ids is not None or (train and self.dropout_prob > 0):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)

    def _check(self, labels):
        # Only labels in host memory: reading others would make every step wait for its device.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not len(labels):
            return
        low, high = labels.aminmax()
        if low < 0 or high >= self.embedding_table.num_embeddings:
            raise ValueError(f"labels must lie in 0 .. {self.embedding_table.num_embeddings - 1} ({self.num_classes} "
                             f"classes{' and the null class' if self.has_null_class else ', no null class'}), "
                             f"got {int(low)} .. {int(high)}")


# ---------------------------------------------------------------- blocks (figure 3, from right to left)

def layer_norm(hidden_size, affine):
    """Layer norm; affine: with a scale and shift of its own, which adaLN makes from the condition instead."""
    return nn.LayerNorm(hidden_size, elementwise_affine=affine, eps=1e-6)


class ViTBlock(nn.Module):
    """In-context conditioning: the plain block of a vision transformer, to which t and y are tokens like any other."""

    affine = True

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **attention_kwargs):
        super().__init__()
        self.norm1 = layer_norm(hidden_size, self.affine)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True, **attention_kwargs)
        self.norm2 = layer_norm(hidden_size, self.affine)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))

    def forward(self, x, c):
        """x (N, T, D) tokens, c None -> (N, T, D)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class CrossAttention(nn.Module):
    """Multi-head attention of tokens x (N, T, D) to a sequence c (N, S, D) -> (N, T, D)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, c):
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T or S, D / heads)
                   for part in (self.q(x), *self.kv(c).chunk(2, dim=2)))
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttentionBlock(ViTBlock):
    """Between self-attention and MLP, the tokens attend to the embeddings of t and y."""

    def __init__(self, hidden_size, num_heads, *args, **kwargs):
        super().__init__(hidden_size, num_heads, *args, **kwargs)
        self.norm_cross = layer_norm(hidden_size, self.affine)
        self.cross_attn = CrossAttention(hidden_size, num_heads)

    def forward(self, x, c):
        """x (N, T, D) tokens, c (N, 2, D) embeddings -> (N, T, D)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        x = x + self.mlp(self.norm2(x))
        return x


class ZeroLinear(nn.Linear):
    """A linear that starts at zero: `DiT.initialize_weights` sees to it."""


class Modulation(nn.Sequential):
    """c (N, D) -> `chunks` vectors of D, side by side: what adaLN shifts, scales and gates with."""

    linear = nn.Linear

    def __init__(self, hidden_size, chunks):
        super().__init__(nn.SiLU(), self.linear(hidden_size, chunks * hidden_size))


class ZeroModulation(Modulation):
    """The same, all zero at first."""

    linear = ZeroLinear


class TableModulation(nn.Module):
    """adaLN-single: c (N, chunks * D) or (N, D), the same for all blocks, plus a table of each block's own."""

    def __init__(self, hidden_size, chunks):
        super().__init__()
        self.table = nn.Parameter(torch.empty(chunks, hidden_size))

    def forward(self, c):
        return (c.unflatten(1, (-1, self.table.shape[1])) + self.table).flatten(1)


class AdaLNBlock(ViTBlock):
    """adaLN: shift and scale of the norms are made from the condition; no gates, and not the identity at first."""

    affine = False

    def __init__(self, hidden_size, *args, **kwargs):
        super().__init__(hidden_size, *args, **kwargs)
        self.adaLN_modulation = Modulation(hidden_size, 4)

    def forward(self, x, c):
        """x (N, T, D) tokens, c (N, D) condition -> (N, T, D)."""
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class DiTBlock(ViTBlock):
    """adaLN-Zero (section 3.2; figure 3, second from the left): with gates that are zero at first."""

    affine, modulation = False, ZeroModulation

    def __init__(self, hidden_size, *args, **kwargs):
        super().__init__(hidden_size, *args, **kwargs)
        self.adaLN_modulation = self.modulation(hidden_size, 6)

    def forward(self, x, c):
        """x (N, T, D) tokens, c (N, D) condition -> (N, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class AdaLNSingleBlock(DiTBlock):
    """adaLN-single (Chen et al., "PixArt-alpha", 2023): the six vectors are made once for all blocks."""

    modulation = TableModulation


class PlainFinalLayer(nn.Module):
    """Tokens (N, T, D) -> patches (N, T, p * p * out_channels)."""

    affine = True

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = layer_norm(hidden_size, self.affine)
        self.linear = ZeroLinear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x, c):
        return self.linear(self.norm_final(x))


class FinalLayer(PlainFinalLayer):
    """Tokens (N, T, D) and condition (N, D) -> patches (N, T, p * p * out_channels)."""

    affine, modulation = False, ZeroModulation

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__(hidden_size, patch_size, out_channels)
        self.adaLN_modulation = self.modulation(hidden_size, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class AdaLNFinalLayer(FinalLayer):
    """Of adaLN: not zero at first, but for its output."""

    modulation = Modulation


class AdaLNSingleFinalLayer(FinalLayer):
    """Of adaLN-single: the condition itself, plus a table."""

    modulation = TableModulation


# ---------------------------------------------------------------- conditioning

class Sum(nn.Module):
    """How the embeddings t, y (N, D) come to the tokens x (N, T, D): here their sum goes to every layer.

    return  tokens, what each block is given beside them, and what the final layer is
    """

    def __init__(self, hidden_size):
        super().__init__()

    def forward(self, x, t, y):
        c = t + y
        return x, c, c


class SharedModulation(Sum):
    """Blocks get the six vectors (N, 6D) that one linear makes for all of them."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.adaLN_modulation = ZeroModulation(hidden_size, 6)

    def forward(self, x, t, y):
        c = t + y
        return x, self.adaLN_modulation(c), c


class Pair(Sum):
    """Blocks get a sequence of two (N, 2, D)."""

    def forward(self, x, t, y):
        return x, torch.stack([t, y], dim=1), None


class ExtraTokens(Sum):
    """Blocks get two tokens more, which have no positions: (N, T + 2, D)."""

    def forward(self, x, t, y):
        return torch.cat([x, torch.stack([t, y], dim=1)], dim=1), None, None


# Name: how t and y come in, the blocks, and the layer after them (section 3.2).
CONDITIONINGS = {
    "adaln-zero": (Sum, DiTBlock, FinalLayer),
    "adaln": (Sum, AdaLNBlock, AdaLNFinalLayer),
    "in-context": (ExtraTokens, ViTBlock, PlainFinalLayer),
    "cross-attention": (Pair, CrossAttentionBlock, PlainFinalLayer),
    "adaln-single": (SharedModulation, AdaLNSingleBlock, AdaLNSingleFinalLayer),
}


# ---------------------------------------------------------------- the model

class DiT(nn.Module):
    """Diffusion transformer.

    input_size          latent side, or a pair (height, width); multiples of patch_size
    patch_size          p: tokens are p x p patches
    in_channels         channels of the latents
    hidden_size         D: a multiple of 4 and of num_heads
    depth               number of blocks
    num_heads           attention heads
    mlp_ratio           hidden width of the MLP over D
    class_dropout_prob  probability of training on the null class; 0: no null class, no guidance
    num_classes         classes; the null class has the number `num_classes`
    learn_sigma         also predict the variance: the output has 2C channels, else C
    conditioning        the type of the blocks, a name in CONDITIONINGS
    raise               ValueError for sizes that do not fit, and for a conditioning that there is not
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, conditioning="adaln-zero"):
        # What a checkpoint needs to build this model again: DiT(**config).
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning is one of {', '.join(CONDITIONINGS)}, not {conditioning!r}")
        condition, block, final_layer = CONDITIONINGS[conditioning]
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.learn_sigma = learn_sigma

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A fixed table, yet a parameter: the published optimiser states count it.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.condition = condition(hidden_size)
        self.checkpointed = 0.0  # share of the blocks that keep no activations in training, but compute them again
        self.blocks = nn.ModuleList([block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = final_layer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def sample_shape(self):
        """Shape (C, H, W) of one input: what noise for a sample has to have."""
        return (self.in_channels, *self.x_embedder.input_size)

    @property
    def device(self):
        """Where the weights lie."""
        return self.pos_embed.device

    @property
    def has_null_condition(self):
        """Whether the model was trained on the null class too, so that it can be guided away from it."""
        return self.y_embedder.has_null_class

    def null_condition(self, cond):
        """The condition of the unconditional half of guidance, for a batch with the condition `cond`."""
        return dict(y=torch.full_like(cond["y"], self.y_embedder.num_classes))

    def initialize_weights(self):
        """Xavier-uniform linears and zero biases, then what the paper sets otherwise (section 3.2, appendix A)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patch projection counts as a linear
                nn.init.zeros_(module.bias)
        hidden_size = self.pos_embed.shape[-1]
        positions = get_2d_sincos_pos_embed(hidden_size, self.x_embedder.grid_size)
        self.pos_embed.data.copy_(torch.from_numpy(positions)[None])
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # Zero gates make each block the identity at first; a zero output layer predicts zero noise.
        for module in self.modules():
            if isinstance(module, ZeroLinear):
                nn.init.zeros_(module.weight)
            elif isinstance(module, TableModulation):
                nn.init.normal_(module.table, std=hidden_size**-0.5)
        for block in self.blocks:  # PixArt's gates begin like its other rows, but it went on from trained weights
            if isinstance(block, AdaLNSingleBlock):
                nn.init.zeros_(block.adaLN_modulation.table[2::3])

    def unpatchify(self, x):
        """Patches (N, T, p * p * out_channels) -> (N, out_channels, H, W)."""
        p, (rows, columns) = self.patch_size, self.x_embedder.grid_size
        if x.shape[1:] != (rows * columns, p * p * self.out_channels):
            raise ValueError(f"cannot put {tuple(x.shape[1:])} (tokens, values) together to {rows} x {columns} patches "
                             f"of {p} x {p} x {self.out_channels}")
        x = x.view(len(x), rows, columns, p, p, self.out_channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), self.out_channels, rows * p, columns * p)

    def forward(self, x, t, y, force_drop_ids=None):
        """Predict the noise (and the variance) of noisy latents.

        x               (N, C, H, W) noisy latents
        t               (N,) timesteps of the trained process, integer or fractional
        y               (N,) class labels; num_classes is the null class
        force_drop_ids  (N,) 1 where the label is to be replaced by the null class; None: at random in training
        return          (N, out_channels, H, W): C channels of noise, and C of variance if learn_sigma
        raise           ValueError for a wrong shape, or a label out of range (labels in host memory)
        """
        x = self.x_embedder(x) + self.pos_embed                                          # (N, T, D)
        t, y = self.t_embedder(t), self.y_embedder(y, self.training, force_drop_ids)     # (N, D) each
        x, c, c_final = self.condition(x, t, y)                                          # adaLN-Zero: x, t + y, t + y
        for i, block in enumerate(self.blocks):
            if self.training and self._is_checkpointed(i):
                x = checkpoint(block, x, c, use_reentrant=False)                         # (N, T, D)
            else:
                x = block(x, c)                                                          # (N, T, D)
        x = x[:, :self.x_embedder.num_patches]                                           # without in-context t and y
        x = self.final_layer(x, c_final)                                                 # (N, T, p * p * 2C)
        return self.unpatchify(x)                                                        # (N, 2C, H, W)

    def _is_checkpointed(self, i):
        """Whether block i is among those that `checkpointed` chooses, at equal distances."""
        return int((i + 1) * self.checkpointed) > int(i * self.checkpointed)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None):
        """Classifier-free guidance (Ho & Salimans, 2021): eps_u + s (eps_c - eps_u) on the noise, never the variance.

        x, t, y       conditional half, then null half, 2N in all; of x only the first half is read
        cfg_scale     s >= 1; 1 is no guidance: one pass over the conditional half, returned in both
        cfg_channels  how many channels are guided. None: all, but 3 of 4 where there are 4 (what the published sampler
                      does, by an oversight that is part of the published FIDs)
        return        (2N, out_channels, H, W), the guided noise in both halves
        raise         ValueError for an odd batch, a model without a null class, a scale below 1, channels that are none
        """
        if not self.y_embedder.has_null_class:
            raise ValueError("guidance needs a null class, and this model was built with class_dropout_prob=0")
        if cfg_scale < 1:
            raise ValueError(f"guidance starts at cfg_scale 1, which means none, not at {cfg_scale}")
        if len(x) % 2:
            raise ValueError(f"guidance takes a conditional and a null half, not an odd batch of {len(x)}")
        guided = default_cfg_channels(self.in_channels) if cfg_channels is None else cfg_channels
        if not 1 <= guided <= self.in_channels:
            raise ValueError(f"cfg_channels must lie in 1 .. {self.in_channels}, the latents' channels, not {guided}")
        n = len(x) // 2
        half = x[:n]
        if cfg_scale == 1:
            out = self(half, t[:n], y[:n])
            return torch.cat([out, out])
        out = self(torch.cat([half, half]), t, y)
        eps, rest = out[:, :guided], out[:, guided:]
        eps_cond, eps_null = eps.chunk(2)
        eps = eps_null + cfg_scale * (eps_cond - eps_null)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


def default_cfg_channels(in_channels):
    """How many latent channels the published sampler guides: 3 of 4, else all."""
    return 3 if in_channels == 4 else in_channels


# ---------------------------------------------------------------- sizes

# Table 1 of the paper: depth, hidden_size, num_heads. Each with patches of 2, 4 and 8.
SIZES = {
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
}


def _builder(size, patch_size):
    depth, hidden_size, num_heads = SIZES[size]

    def build(**kwargs):
        sizes = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)
        return DiT(**sizes | kwargs)

    build.__name__ = build.__qualname__ = f"DiT_{size}_{patch_size}"
    build.__doc__ = (f"DiT-{size}/{patch_size}: {depth} blocks of width {hidden_size}, {num_heads} heads, "
                     f"patches of {patch_size}. Keywords as for `DiT`, which also override these.")
    return build


DiT_XL_2, DiT_XL_4, DiT_XL_8 = (_builder("XL", patch_size) for patch_size in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (_builder("L", patch_size) for patch_size in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (_builder("B", patch_size) for patch_size in (2, 4, 8))
DiT_S_2, DiT_S_4, DiT_S_8 = (_builder("S", patch_size) for patch_size in (2, 4, 8))

DiT_models = {
    "DiT-XL/2": DiT_XL_2, "DiT-XL/4": DiT_XL_4, "DiT-XL/8": DiT_XL_8,
    "DiT-L/2": DiT_L_2, "DiT-L/4": DiT_L_4, "DiT-L/8": DiT_L_8,
    "DiT-B/2": DiT_B_2, "DiT-B/4": DiT_B_4, "DiT-B/8": DiT_B_8,
    "DiT-S/2": DiT_S_2, "DiT-S/4": DiT_S_4, "DiT-S/8": DiT_S_8,
}
