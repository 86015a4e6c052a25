"""SMT: convolutions of many scales that modulate, early; attention, late; and both in turn between.

Scale-aware modulation splits the channels in heads, gives each its own kernel (3, 5, 7, 9), regroups them so that every
small group has one channel of each scale, mixes the groups, and multiplies values by the result:
    m = W_1 gelu(bn(W_0 regroup(conv_3, conv_5, ...)(W_s x))),   out = proj(m * W_v x).
What networks come to rely on goes from near to far with depth: modulation in the first two stages, attention (with a
depthwise convolution of its values) in the last, and the third takes turns.

Lin, Wu, Chen, Huang, Jin, "Scale-Aware Modulation Meet Transformer", 2023, section 3.

Any grid: convolutions pad with zeros. Quirks kept: the activation of the MLP acts on its hidden map plus a depthwise
convolution of it; patch embeddings have norms of eps 1e-5, all others 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1, pvt_names, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import EarlyLocalMlp, Gelu
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import global_tokens

_PUBLISHED = ("smt_t", "smt_s", "smt_b", "smt_l")

_ADDRESS = "https://github.com/AFeng-x/SMT/releases/download/v1.0.0/"

CARD = Card(
    "Scale-Aware Modulation Meet Transformer",
    authors="Lin, Wu, Chen, Huang, Jin",
    year=2023,
    systems=("smt",),
    arxiv="2307.08579",
    code="AFeng-x/SMT@11e954d",
    licence="MIT",
    read="paper",
    keywords="scale-aware modulation, multi-head mixed convolution, evolutionary hybrid network, multi-scale",
    kinds=("backbone", "mixer"),
    mixers={"scale_aware_modulation": "ScaleAwareModulation", "local_attention_of_values": "LocalValueAttention"},
    params=dict(zip(_PUBLISHED, (11.5e6, 20.5e6, 32.0e6, 80.5e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (2.4e9, 4.7e9, 7.7e9, 17.7e9), strict=True)),
    top1=dict(zip(_PUBLISHED[:3], (82.2, 83.7, 84.3), strict=True)),
    weights={
        "smt_t": Weights(_ADDRESS + "smt_tiny.pth"),
        "smt_s": Weights(_ADDRESS + "smt_small.pth"),
        "smt_b": Weights(_ADDRESS + "smt_base.pth"),
        "smt_l": Weights(_ADDRESS + "smt_large_22k_224_ft.pth", data="ImageNet-22K, ImageNet-1K"),
    },
    goldens=("smt_t", "op_scale_aware_modulation", "op_smt_attention"),
)


class ScaleAwareModulation(nn.Module):
    """out = proj(m * v), m from convolutions of kernels 3, 5, 7, ..., one a scale: (B, *grid, C) -> (B, *grid, C).

    `scales` is their number, `expand` how wide the mix of a group becomes. Raises SaccadeError where the scales do not
    divide the width. (Lin et al., SMT, 2023, section 3.2.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i] of several kernels", "none", "sum of x, times v")

    def __init__(self, site: Site, scales: int = 4, expand: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        if site.dim % scales:
            raise SaccadeError(f"{scales} scales do not divide {site.dim} channels; choose a divisor")
        self.scales, self.expand = scales, expand
        groups = site.dim // scales
        self.v = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.s = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.local = nn.ModuleList(depthwise(site.rank, groups, 3 + 2 * scale) for scale in range(scales))
        self.mix = nn.Sequential(
            grid_conv(site.rank, site.dim, site.dim * expand, 1, groups=groups), BatchNorm(site.dim * expand), Gelu(),
            nn.Linear(site.dim * expand, site.dim),
        )
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(part) for conv, part in zip(self.local, self.s(x).chunk(self.scales, -1), strict=True)]
        return self.proj(self.mix(torch.stack(parts, -1).flatten(-2)) * self.v(x))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token: projections 3 C^2, mix C e (scales + C), C / scales (3^rank + 5^rank + ...)."""
        local = sum((3 + 2 * scale) ** site.rank for scale in range(self.scales)) * site.dim // self.scales
        return prod(grid) * (site.dim**2 * (3 + self.expand) + site.dim * self.expand * self.scales + local)

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.scales,) * site.rank


class LocalValueAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v + conv_3(v)) over all tokens: (B, *grid, C) -> (B, *grid, C)."""

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d)", "softmax", "sum of v, and a convolution of v")

    def __init__(self, site: Site, heads: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads or site.heads
        check_heads(Site(site.dim, self.heads))
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.local = depthwise(site.rank, site.dim, 3)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).flatten(1, -4).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=lambda: global_tokens(q.shape[2], x.device)).transpose(1, 2).reshape(x.shape)
        return self.proj(out + self.local(qkv.chunk(3, -1)[2]))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 + 2 N^2 C + N C 3^rank."""
        tokens = prod(grid)
        return tokens * site.dim * (4 * site.dim + 2 * tokens + 3**site.rank)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


_SMALL: dict[str, Any] = dict(dims=(64, 128, 256, 512), ratios=(4, 4, 4, 2))
_BASE: dict[str, Any] = dict(dims=(64, 128, 256, 512), ratios=(8, 6, 4, 2), kernel=7)
SIZES: dict[str, dict[str, Any]] = {
    "smt_t": _SMALL | dict(depths=(2, 2, 8, 1)),
    "smt_s": _SMALL | dict(depths=(3, 4, 18, 1)),
    "smt_b": _BASE | dict(depths=(4, 6, 28, 2)),
    "smt_l": _BASE | dict(dims=(96, 192, 384, 768), depths=(4, 6, 28, 4)),
    "smt_nano": dict(dims=(32, 64, 128), depths=(1, 2, 1), heads=(None, 2, 4), ratios=(4, 4, 2), patch=2, img_size=32),
}


def smt(
    dims: Sequence[int],
    depths: Sequence[int],
    ratios: Sequence[float],
    heads: Sequence[int | None] = (None, None, 8, 16),
    scales: int = 4,
    kernel: int = 3,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """An SMT of a size: `heads` of attention a stage; None is modulation alone, the last stage attention alone."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        half = grid_conv(rank, in_chans, dim, kernel, stride=2, padding=kernel // 2, bias=False)
        steps = [half, BatchNorm(dim), nn.ReLU()] if patch == 4 else []
        patches = grid_conv(rank, dim if steps else in_chans, dim, 2, stride=2)
        return ConvStem(*steps, patches, nn.LayerNorm(dim), least=patch)

    def own(site: Site) -> nn.Module:
        count = heads[site.stage]
        if count is None or (site.stage < len(depths) - 1 and site.index % 2 == 0):
            return ScaleAwareModulation(site, scales)
        return LocalValueAttention(site, count)

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return Block(site, mixer, drop_path=drop_path, mlp=partial(EarlyLocalMlp, site.rank, ratio=ratios[site.stage]))

    return Pyramid(
        dims, depths, [count or max(dim // 32, 1) for count, dim in zip(heads, dims, strict=False)], stem=stem,
        stride=patch, downsample=ConvMerging, block=block, mixer=own, stage_norm=LAYER_NORM, replace=mixer, **common,
    )


MODULATION: KeyMap = (
    *((rf"local_conv_{scale + 1}\.(.*)", rf"local.{scale}.\1") for scale in range(9)),
    (r"proj0\.(.*)", r"mix.0.\1"),
    (r"bn\.(.*)", r"mix.1.\1"),
    (r"proj1\.weight", "mix.3.weight", matrix_from_1x1),
    (r"proj1\.bias", "mix.3.bias"),
)
ATTENTION: KeyMap = ((r"q\.(.*)", r"qkv.\1#0"), (r"kv\.(.*)", r"qkv.\1#1"), (r"local_conv\.(.*)", r"local.\1"))
AUTHORS: KeyMap = (
    (r"patch_embed1\.conv\.(.*)", r"stem.\1"),
    (r"patch_embed1\.norm\.(.*)", r"stem.4.\1"),
    *pvt_names((*within((*MODULATION, *ATTENTION), r"attn\.", "mixer."), (r"attn\.(.*)", r"mixer.\1"),
                (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1"))),
)
TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
