"""S2AFormer: attention with few keys and thin queries, strips of one number a token and head.

Keys and values are of a map reduced r x r by a convolution; queries and keys have c channels a head, values all of
theirs:
    out = W_o softmax(q k^T / sqrt(c)) v,   q = W_q x,   k = W_k reduce(x),   v = W_v reduce(x),
so that N^2 2C multiply-adds become N (N / r^2) (c h + C). It stands in a block of four steps, each beside a shortcut:
a depthwise convolution without norm, this attention, a local interaction of neighbours, an MLP.

Xu, Huang, Jia, Li, Gao, Qi, "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", 2025, section III.

Any grid: the map is zero-padded at its end to whole r x r before it is reduced; convolutions pad with zeros.
No code of the model is public. The two compressions, the block's equations, a stem of three 3x3 convolutions of which
the first has stride 2, four stages of strides 4 to 32, and the parameters, multiply-adds and accuracies of five sizes
are the paper's. Ours, because the rest was not at hand: widths and depths (fitted to parameters and multiply-adds: the
authors' weights would not load), c = 1, r = 8, 4, 2, 1 a stage, a depthwise `reduce` with a norm, the local interaction
(depthwise 3x3, batch norm, GELU, depthwise 3x3), heads of 32 channels, an MLP of ratio 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.record import Where, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.window import pad_to_multiple
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, residual_tail
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import strided_tokens, token_numbers

_PUBLISHED = ("s2aformer_mini", "s2aformer_t", "s2aformer_xs", "s2aformer_s", "s2aformer_m")

CARD = Card(
    "S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    authors="Xu, Huang, Jia, Li, Gao, Qi",
    year=2025,
    systems=("s2aformer",),
    arxiv="2505.22195",
    read="paper (abstract, a review, its table of sizes)",
    keywords="strip self-attention, hybrid perception block, local interaction module, compressed queries and keys",
    kinds=("backbone", "mixer"),
    mixers={"strip_attention": "StripAttention"},
    # The paper's totals, as collected in igm503/heedless-backbones@0663141: our widths and depths were fitted to them.
    params=dict(zip(_PUBLISHED, (5.02e6, 5.80e6, 6.54e6, 10.69e6, 24.87e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (0.43e9, 0.655e9, 0.786e9, 1.38e9, 4.12e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (75.1, 77.7, 78.9, 80.8, 82.3), strict=True)),
    tests=("tests/papers/test_s2aformer.py",),
)


class StripAttention(nn.Module):
    """out = W_o softmax(q k^T / sqrt(c)) v, k and v of the reduced map: (B, *grid, C) -> (B, *grid, C).

    `reduction` is r (by default what brings the map to stride 32), `qk_dim` is c, the channels of a query in each head.
    """

    ranks, weights = (1, 2, 3), True
    template = Template("q k^T / sqrt(c) to a map reduced along both axes", "softmax", "sum of v, reduced")

    def __init__(self, site: Site, reduction: int | None = None, qk_dim: int = 1) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.qk_dim = site.heads, qk_dim
        self.reduction = max(1, 32 // site.stride) if reduction is None else reduction
        thin = site.heads * qk_dim
        self.q = nn.Linear(site.dim, thin)
        self.kv = nn.Linear(site.dim, thin + site.dim)
        self.reduce: nn.Module = nn.Identity()
        if self.reduction > 1:
            merge = grid_conv(site.rank, site.dim, site.dim, self.reduction, stride=self.reduction, groups=site.dim)
            self.reduce = nn.Sequential(merge, LAYER_NORM(site.dim))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(pad_to_multiple(x, (self.reduction,) * (x.ndim - 2)))
        q = self.q(x).flatten(1, -2)
        k, v = self.kv(reduced).flatten(1, -2).split((q.shape[-1], x.shape[-1]), -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        # The fused kernels want one width: zeros beside a strip cost less than weights that are written out.
        missing = v.shape[-1] - self.qk_dim
        if missing > 0 and not recording():
            q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
        out = attend(q, k, v, where=self.where(x, reduced), scale=self.qk_dim**-0.5)
        return self.proj(out.transpose(1, 2).flatten(2).view(x.shape))

    def where(self, x: Tensor, reduced: Tensor) -> Where:
        """A key stands for the token in the middle of those that it merges."""
        grid, cells = tuple(x.shape[1:-1]), tuple(reduced.shape[1:-1])
        return lambda: (token_numbers(prod(grid), x.device), strided_tokens(grid, cells, self.reduction, 0, x.device))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N queries and M keys: projections, reduction, products N M (c h + C)."""
        dim, thin, tokens = site.dim, site.heads * self.qk_dim, prod(grid)
        keys = prod(-(-side // self.reduction) for side in grid)
        reducing = keys * self.reduction**site.rank * dim if self.reduction > 1 else 0
        return (tokens + keys) * dim * (thin + dim) + reducing + tokens * keys * (thin + dim)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, merged with its neighbours."""
        return None


class LocalInteraction(nn.Sequential):
    """conv(gelu(norm(conv(x)))), both depthwise 3x3: (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__(depthwise(rank, dim, 3), BatchNorm(dim), Gelu(), depthwise(rank, dim, 3))


class HybridPerceptionBlock(nn.Module):
    """x += conv(x); x += mixer(norm(x)); x += interact(norm(x)); x += mlp(norm(x)), drop path on the last three."""

    def __init__(self, site: Site, mixer: nn.Module, drop_path: float = 0.0, ratio: float = 4.0) -> None:
        super().__init__()
        self.site = site
        self.local = depthwise(site.rank, site.dim, 3)
        self.norm1 = LAYER_NORM(site.dim)
        self.mixer = mixer
        self.norm2 = LAYER_NORM(site.dim)
        self.interact = LocalInteraction(site.rank, site.dim)
        self.norm3 = LAYER_NORM(site.dim)
        self.mlp = Mlp(site.dim, ratio)
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x)
        x = x + self.tail(self.mixer(self.norm1(x)))
        x = x + self.tail(self.interact(self.norm2(x)))
        return x + self.tail(self.mlp(self.norm3(x)))


_SLIM: dict[str, Any] = dict(dims=(24, 48, 192, 384))
SIZES: dict[str, dict[str, Any]] = {
    "s2aformer_mini": _SLIM | dict(depths=(1, 1, 2, 2)),
    "s2aformer_t": _SLIM | dict(depths=(3, 3, 4, 2)),
    "s2aformer_xs": _SLIM | dict(depths=(3, 3, 6, 2)),
    "s2aformer_s": _SLIM | dict(depths=(3, 4, 13, 3)),
    "s2aformer_m": dict(dims=(64, 128, 320, 512), depths=(2, 4, 13, 3)),
    "s2aformer_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), reductions=(4, 2, 1), patch=2, img_size=32),
}


def s2aformer(
    dims: Sequence[int],
    depths: Sequence[int],
    reductions: Sequence[int] = (8, 4, 2, 1),
    qk_dim: int = 1,
    ratio: float = 4.0,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """An S2AFormer of a size; `reductions` are r a stage, `qk_dim` is c."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        half = dim // 2
        layers = [layer for width, stride in ((in_chans, patch // 2), (half, 1), (half, 1))
                  for layer in (*conv_norm(rank, width, half, stride=stride), Gelu())]
        return ConvStem(*layers, ConvMerging(rank, half, dim))

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch, downsample=ConvMerging,
        block=partial(HybridPerceptionBlock, ratio=ratio),
        mixer=[partial(StripAttention, reduction=reduction, qk_dim=qk_dim) for reduction in reductions],
        norm=LAYER_NORM, replace=mixer, **common,
    )
