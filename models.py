"""DiT, the diffusion transformer (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748).

In the order of the paper's section 3.2: positions, embeddings, the adaLN-Zero block, the final layer, DiT, its sizes.
Shapes: N batch, C channels, H W height and width of the latents, p patch size, T tokens, D width.
"""
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from timm.layers import Attention, Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class DiTConfig:
    """Arguments of `DiT`: all that is needed to build its architecture again."""

    input_size: int | tuple[int, int] = 32  # side of the latents, or (height, width); multiples of patch_size
    patch_size: int = 2                     # p: a token is a patch of p x p latents
    in_channels: int = 4                    # C, channels of the latents
    hidden_size: int = 1152                 # D, a multiple of 4 and of num_heads
    depth: int = 28                         # number of blocks
    num_heads: int = 16                     # attention heads of a block
    mlp_ratio: float = 4.0                  # hidden width of a block's MLP over D
    class_dropout_prob: float = 0.1         # probability of training on the null class; 0: no null class, no guidance
    num_classes: int = 1000                 # labels are 0 .. num_classes - 1; the null class is num_classes
    learn_sigma: bool = True                # predict the variance too: 2C output channels, otherwise C


def get_2d_sincos_pos_embed(embed_dim, grid_size):
    """Compute the fixed positions of a grid of tokens in row-major order: (T, D) float64.

    Args:
        embed_dim (int): D, a multiple of 4. The first half encodes a token's column, the second half its row.
        grid_size (int | tuple[int, int]): Tokens a side, or (rows, columns).
    """
    if embed_dim % 4:
        raise ValueError(f"a 2-D sine-cosine position table needs a width that is a multiple of 4, not {embed_dim}")
    row, column = np.indices(as_pair(grid_size, "grid_size")).reshape(2, -1)
    return np.concatenate([_sincos(embed_dim // 2, column), _sincos(embed_dim // 2, row)], axis=1)


def _sincos(dim, position):
    """Encode positions (T,) as dim/2 sines and dim/2 cosines (Vaswani et al., 2017, section 3.5): (T, dim)."""
    frequency = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))
    angle = np.outer(position, frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def as_pair(value, name):
    """Return a positive int, or a pair of them, as a pair (height, width)."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in pair):
        raise ValueError(f"{name} must be a positive integer or a pair of them (height, width), not {value!r}")
    return pair


class PatchEmbed(nn.Module):
    """Patchify (figure 4): each p x p patch of latents becomes one token, T = (H / p)(W / p), in row-major order."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        self.input_size = as_pair(input_size, "input_size")
        self.patch_size = as_pair(patch_size, "patch_size")
        if any(side % patch_size for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} cannot be divided into patches of patch_size {patch_size}")
        self.grid_size = tuple(side // patch_size for side in self.input_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        """Embed latents (N, C, H, W) as tokens (N, T, D)."""
        expected = (self.proj.in_channels, *self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"the model takes inputs of (channels, height, width) = {expected}, "
                             f"got {tuple(x.shape[1:])}")
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embed timesteps by sinusoidal features and an MLP."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Compute dim / 2 cosines and dim / 2 sines of integer or fractional timesteps (N,): (N, dim) float32."""
        half = dim // 2
        frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return nn.functional.pad(features, (0, dim % 2))

    def forward(self, t):
        """Embed timesteps (N,) as vectors (N, D)."""
        # Without autocast: bfloat16 has 8 bits, too few for the sines of large timesteps.
        with torch.autocast("cpu" if t.device.type == "meta" else t.device.type, enabled=False):
            features = self.timestep_embedding(t, self.frequency_embedding_size)
            return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embed class labels 0 .. num_classes - 1; with dropout_prob > 0 there is also the null class, num_classes."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], not {dropout_prob}")
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.has_null_class = dropout_prob > 0
        self.embedding_table = nn.Embedding(num_classes + self.has_null_class, hidden_size)

    def token_drop(self, labels, force_drop_ids=None):
        """Replace labels (N,) by the null class if force_drop_ids (N,) is 1; without force_drop_ids at random."""
        if not self.has_null_class:
            raise ValueError("this model was built with class_dropout_prob=0: it has no null class to drop labels to")
        if force_drop_ids is None:
            force_drop_ids = torch.rand(len(labels), device=labels.device) < self.dropout_prob
        return torch.where(force_drop_ids == 1, self.num_classes, labels)

    def forward(self, labels, train, force_drop_ids=None):
        """Embed labels (N,) as vectors (N, D); `train` drops labels at random unless force_drop_ids (N,) says which."""
        self._check_range(labels)
        if force_drop_ids is not None or (train and self.dropout_prob > 0):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)

    def _check_range(self, labels):
        # Only in host memory: reading labels on a device would make every step wait for it.
        if labels.device.type == "cpu" and len(labels) and not torch.compiler.is_compiling():
            (low, high), end = labels.aminmax(), self.embedding_table.num_embeddings
            if low < 0 or high >= end:
                raise ValueError(f"labels must lie in 0 .. {end - 1} ({self.num_classes} classes"
                                 f"{' and the' if self.has_null_class else ', no'} null class), got {low} .. {high}")


def modulate(x, shift, scale):
    """Scale and shift tokens x (N, T, D) by one vector (N, D) each per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layer_norm(hidden_size, affine=False):
    """Return a layer norm; adaLN takes scale and shift from the condition, so it needs no affine part."""
    return nn.LayerNorm(hidden_size, elementwise_affine=affine, eps=1e-6)


class ZeroInitLinear(nn.Linear):
    """A linear layer that `DiT.initialize_weights` sets to zero."""


class ZeroInitModulation(nn.Sequential):
    """Map a condition (N, D) to `chunks` vectors of width D that are zero at the start: (N, chunks * D)."""

    def __init__(self, hidden_size, chunks):
        super().__init__(nn.SiLU(), ZeroInitLinear(hidden_size, chunks * hidden_size))


class AdaLNConditioning(nn.Module):
    """Condition all layers on the sum of the embeddings of timestep and class (section 3.2)."""

    def __init__(self, hidden_size):
        super().__init__()

    def forward(self, x, t, y):
        """Combine tokens (N, T, D) and embeddings (N, D): tokens, condition of the blocks and of the final layer."""
        c = t + y
        return x, c, c


class DiTBlock(nn.Module):
    """adaLN-Zero: shift, scale and gate from the condition. Gates of zero make a new block the identity."""

    modulation_class, num_modulations = ZeroInitModulation, 6

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **block_kwargs):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True, **block_kwargs)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = self.modulation_class(hidden_size, self.num_modulations)

    def forward(self, x, c):
        """Transform tokens x (N, T, D) under the condition c (N, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Decode tokens to patches by adaLN and a linear layer ("Transformer decoder" of section 3.2)."""

    modulation_class = ZeroInitModulation

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = ZeroInitLinear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = self.modulation_class(hidden_size, 2)

    def forward(self, x, c):
        """Decode tokens x (N, T, D) under the condition c (N, D) to patches (N, T, p * p * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer (figure 3). `config` holds the arguments; sizes that do not fit raise a ValueError."""

    conditioning = "adaln-zero"
    conditioning_class, block_class, final_layer_class = AdaLNConditioning, DiTBlock, FinalLayer

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.config = DiTConfig(input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
                                class_dropout_prob, num_classes, learn_sigma)
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size, self.num_heads, self.learn_sigma = patch_size, num_heads, learn_sigma
        self.checkpointed = 0.0  # share of the blocks that recompute their activations in the backward pass

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.sample_shape = (in_channels, *self.x_embedder.input_size)  # (C, H, W)
        self.num_tokens = self.x_embedder.num_patches  # T
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.has_null_condition = self.y_embedder.has_null_class
        # A parameter although it is fixed: the published optimizer states count it.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.condition = self.conditioning_class(hidden_size)
        self.blocks = nn.ModuleList([self.block_class(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = self.final_layer_class(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Set the weights that training starts from (section 3.2, "adaLN-Zero block"; appendix A)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patch projection counts as a linear
                nn.init.zeros_(module.bias)
        positions = get_2d_sincos_pos_embed(self.config.hidden_size, self.x_embedder.grid_size)
        self.pos_embed.data.copy_(torch.from_numpy(positions)[None])
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, ZeroInitLinear):
                nn.init.zeros_(module.weight)

    def forward(self, x, t, y, force_drop_ids=None):
        """Predict the noise, and the variance if learn_sigma, of noisy latents: (N, out_channels, H, W).

        Args:
            x (Tensor): Noisy latents, shape (N, C, H, W).
            t (Tensor): Timesteps of the trained process, integer or fractional, shape (N,).
            y (Tensor): Class labels, shape (N,); num_classes is the null class.
            force_drop_ids (Tensor): 1 for labels to replace by the null class, shape (N,). Default: random in training.
        """
        x = self.x_embedder(x) + self.pos_embed                                             # (N, T, D)
        t = self.t_embedder(t)                                                              # (N, D)
        y = self.y_embedder(y, self.training, force_drop_ids)                               # (N, D)
        x, c, c_final = self.condition(x, t, y)                                             # (N, D): c = t + y
        for i, block in enumerate(self.blocks):
            recompute = self.training and self._is_checkpointed(i)
            x = checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)  # (N, T, D)
        x = self.final_layer(x, c_final)                                                    # (N, T, p * p * 2C)
        return self.unpatchify(x)                                                           # (N, 2C, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None):
        """Predict with classifier-free guidance (section 3.1): eps_u + s (eps_c - eps_u), of the noise alone.

        Args:
            x (Tensor): Noisy latents, shape (2N, C, H, W); only the first half is read.
            t (Tensor): Timesteps, shape (2N,).
            y (Tensor): Labels, then the null class, shape (2N,).
            cfg_scale (float): s; 1 means no guidance, one pass over the conditional half.
            cfg_channels (int): Number of guided channels. Default: `default_cfg_channels`.
        """
        if not self.has_null_condition:
            raise ValueError("guidance needs a null class, and this model was built with class_dropout_prob=0")
        if cfg_scale < 1:
            raise ValueError(f"cfg_scale must be at least 1, which means no guidance, not {cfg_scale}")
        if len(x) % 2:
            raise ValueError(f"guidance takes a conditional and a null half, not an odd batch of {len(x)}")
        guided = default_cfg_channels(self.in_channels) if cfg_channels is None else cfg_channels
        if not 1 <= guided <= self.in_channels:
            raise ValueError(f"cfg_channels must lie in 1 .. {self.in_channels}, the latents' channels, not {guided}")
        half = x[:len(x) // 2]
        if cfg_scale == 1:
            out = self(half, t[:len(half)], y[:len(half)])
            return torch.cat([out, out])
        out = self(torch.cat([half, half]), t, y)
        eps, rest = out[:, :guided], out[:, guided:]
        eps_cond, eps_null = eps.chunk(2)
        eps = eps_null + cfg_scale * (eps_cond - eps_null)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    def unpatchify(self, x):
        """Arrange patches (N, T, p * p * out_channels) as images (N, out_channels, H, W)."""
        p, (rows, columns) = self.patch_size, self.x_embedder.grid_size
        if x.shape[1:] != (rows * columns, p * p * self.out_channels):
            raise ValueError(f"cannot arrange {tuple(x.shape[1:])} (tokens, values) as {rows} x {columns} patches "
                             f"of {p} x {p} x {self.out_channels}")
        x = torch.einsum("nhwpqc->nchpwq", x.view(len(x), rows, columns, p, p, self.out_channels))
        return x.reshape(len(x), self.out_channels, rows * p, columns * p)

    @property
    def device(self):
        """Device of the weights."""
        return self.pos_embed.device

    def null_condition(self, cond):
        """Return the null condition for a batch of conditions, each a dict of arguments of `forward`."""
        return dict(y=torch.full_like(cond["y"], self.config.num_classes))

    def _is_checkpointed(self, i):
        """Whether block i is among the share `checkpointed` of the blocks, evenly spaced."""
        return int((i + 1) * self.checkpointed) > int(i * self.checkpointed)


def default_cfg_channels(in_channels):
    """Return the number of channels to guide: 3 of 4, an oversight that the published FIDs contain, otherwise all."""
    return 3 if in_channels == 4 else in_channels


# Table 1 of the paper: depth, hidden_size, num_heads. Each comes with patches of 2, 4 and 8.
SIZES = {
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
}
# "DiT-XL/2": a constructor of that size; its keywords can be overridden.
DiT_models = {f"DiT-{name}/{p}": partial(DiT, patch_size=p, depth=depth, hidden_size=hidden_size, num_heads=num_heads)
              for name, (depth, hidden_size, num_heads) in SIZES.items() for p in (2, 4, 8)}

(DiT_XL_2, DiT_XL_4, DiT_XL_8, DiT_L_2, DiT_L_4, DiT_L_8,
 DiT_B_2, DiT_B_4, DiT_B_8, DiT_S_2, DiT_S_4, DiT_S_8) = DiT_models.values()
SiT_models = {name.replace("DiT", "SiT"): size for name, size in DiT_models.items()}  # the same, for transport/
