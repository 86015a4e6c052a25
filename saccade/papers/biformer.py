"""BiFormer: every region of the map chooses the few regions that its tokens attend to.

Cut the map into S x S regions. Level one, between regions: with the mean query and key of each,
    A_r[i, j] = q_r[i] . k_r[j],        I[i] = the k regions j of largest A_r[i, j];
level two, between tokens: those of region i attend to all tokens of the regions I[i], gathered into one dense block,
    out = softmax(q k[I]^T / sqrt(C)) v[I] + conv(v),
where conv is a 5x5 depthwise convolution (local context enhancement). k grows from stage to stage while regions shrink,
1, 4, 16 of 49; the last stage attends to everything. The indices carry no gradient: q and k learn through level two.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023, sections 3.2-3.4.

Any grid: one that is no multiple of S is zero-padded at its end, before qkv; padded tokens (which carry the bias) count
in the means, are attended to without a mask and are seen by the convolution, as in the authors' dense-prediction code.
Quirks kept: logits are scaled by the whole width, not a head's; the last stage has 8 heads whatever its width, no bias
for q, k and v, and convolves the block's input, not v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.sizes import ceil_div, larger, smaller
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_end, partition
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import conv_norm, depthwise, grid_conv, on_grid
from saccade.parts.merging import NormedMerging
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import global_tokens

_SHARES = {
    "biformer_tiny": "s!AkBbczdRlZvChHEOoGkgwgQzEDlM",
    "biformer_small": "s!AkBbczdRlZvChHDyM-x9KWRBZ832",
    "biformer_base": "s!AkBbczdRlZvChHI_XPhoadjaNxtO",
    "biformer_stl": "s!AkBbczdRlZvChSf-m7ujkvx9lIQ1",
    "biformer_stl_nchw": "s!AkBbczdRlZvChWYrKbWbMgqd2Ai0",
}

CARD = Card(
    "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    authors="Zhu, Wang, Ke, Zhang, Lau",
    year=2023,
    systems=("biformer",),
    arxiv="2303.08810",
    code="rayleizhu/BiFormer@1697bbb",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="bi-level routing attention, dynamic sparse attention, query-adaptive, region-to-region routing, top-k, "
             "local context enhancement",
    kinds=("backbone", "mixer"),
    mixers={"bilevel_routing": "BiLevelRouting"},
    params={"biformer_tiny": 13.1e6, "biformer_small": 25.5e6, "biformer_base": 56.8e6, "biformer_stl": 28.4e6,
            "biformer_stl_nchw": 28.4e6},
    macs={"biformer_tiny": 2.2e9, "biformer_small": 4.5e9, "biformer_base": 9.8e9, "biformer_stl": 4.6e9,
          "biformer_stl_nchw": 4.6e9},
    top1={"biformer_tiny": 81.4, "biformer_small": 83.8, "biformer_base": 84.3, "biformer_stl": 82.7,
          "biformer_stl_nchw": 82.7},
    weights={name: Weights(f"https://api.onedrive.com/v1.0/shares/{share}/root/content", licence="MIT")
             for name, share in _SHARES.items()},
    goldens=("biformer_tiny", "op_bilevel_routing_attention", "op_bilevel_routing_attention_nchw",
             "op_bilevel_routing_attention_nchw_pad", "op_bilevel_routing_attention_pad",
             "op_bilevel_routing_attention_soft"),
    tests=("tests/papers/test_biformer.py",),
)

Grid = tuple[int, ...]


class BiLevelRouting(nn.Module):
    """out = proj(softmax(scale q k[I]^T) v[I] + conv(v)), I the `topk` regions that a region of the queries chooses.

    (B, *grid, C) -> (B, *grid, C). Each axis is cut into `regions` parts; a `topk` beyond all regions is all of them.
    `kernel` is the convolution's side, `qk_dim` the width of q and k, `scale` defaults to qk_dim^-1/2. `pool`, a
    channels-first layer, shrinks the keys and values of each region. Raises SaccadeError where the heads do not divide
    a width.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) in the regions chosen by mean q k^T", "softmax", "sum of v, and a convolution of v"
    )

    def __init__(
        self, site: Site, regions: int = 7, topk: int = 4, kernel: int = 5, qk_dim: int | None = None,
        scale: float | None = None, pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.qk_dim = site.dim, qk_dim or site.dim
        check_heads(site)
        check_heads(replace(site, dim=self.qk_dim))
        if min(regions, topk) < 1:
            raise SaccadeError(f"regions={regions}, topk={topk}: both are at least 1")
        self.heads, self.regions, self.topk, self.kernel = site.heads, regions, topk, kernel
        self.scale = self.qk_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(site.dim, 2 * self.qk_dim + site.dim)
        self.local = depthwise(site.rank, site.dim, kernel)
        self.pool = pool
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        side, padded = self.layout(grid)
        qkv = self.qkv(partition(pad_to(x, padded), side))  # (B R, N, 2 qk + C)
        means = qkv[..., : 2 * self.qk_dim].mean(1).unflatten(0, (x.shape[0], -1))
        out = merge(self.attend(qkv, means, grid), side, padded)
        out = out + self.local(merge(qkv[..., 2 * self.qk_dim :], side, padded))
        return self.proj(crop(out, grid))

    def layout(self, grid: Grid) -> tuple[Grid, Grid]:
        """Sides of a region, and of the padded grid, in tokens."""
        side = tuple(ceil_div(size, self.regions) for size in grid)
        return side, tuple(self.regions * part for part in side)

    def attend(self, qkv: Tensor, means: Tensor, grid: Grid) -> Tensor:
        """Both levels: the regions' qkv (B R, N, 2 qk + C), their mean queries and keys (B, R, 2 qk) -> (B R, N, C)."""
        q, kv = qkv.split((self.qk_dim, self.qk_dim + self.dim), -1)
        if self.pool is not None:
            kv = self._pooled(kv, self.layout(grid)[0])
        routes, kv = self.choose(means, kv)
        k, v = kv.split((self.qk_dim, self.dim), -1)

        def where() -> tuple[Tensor, Tensor]:
            tokens = region_tokens(grid, *self.layout(grid), qkv.device)
            return tokens, tokens[routes].flatten(2).flatten(0, 1)

        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = attend(q, k, v, where=where if self.pool is None else None, scale=self.scale)
        return out.transpose(1, 2).flatten(2)

    def choose(self, means: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Level one: which regions each looks at, (B, R, K), and their keys and values, (B R, K N, qk + C)."""
        q, k = means.detach().chunk(2, -1)
        routes = (q @ k.transpose(1, 2)).topk(self.count(means), -1).indices
        return routes, gather_regions(kv, routes)

    def count(self, means: Tensor) -> int:
        """How many regions are chosen of those there are."""
        return smaller(self.topk, means.shape[1])

    def _pooled(self, kv: Tensor, side: Grid) -> Tensor:
        assert self.pool is not None
        return on_grid(self.pool, kv.unflatten(1, side)).flatten(1, -2)

    def reach(self, site: Site) -> None:
        """A region may choose any other."""
        return None

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds, over N tokens of the padded grid, R regions and M keys a query: projections 2 N C (qk + C),
        routing R^2 qk, attention N M (qk + C), convolution N C kernel^rank.
        """
        return self._cost(grid, self.layout(grid)[1])

    def _cost(self, grid: Grid, projected: Grid) -> int:
        """With projections and convolution on the grid `projected`."""
        side, padded = self.layout(grid)
        regions, keys = prod(padded) // prod(side), prod(side)
        if self.pool is not None:
            keys = self._pooled(torch.empty(1, prod(side), 1, device="meta"), side).shape[1]
        both = self.qk_dim + self.dim
        each = 2 * self.dim * both + self.dim * self.kernel ** len(grid)
        return (prod(projected) * each + regions**2 * self.qk_dim
                + prod(padded) * min(self.topk, regions) * keys * both)


class SoftRouting(BiLevelRouting):
    """Bi-level routing whose choice learns: keys and values are multiplied by the softmax of their region's score.

    Not in the paper, but in its code. `differentiable` lets gradients through the scores; `learned` puts a linear layer
    before them.
    """

    def __init__(self, site: Site, differentiable: bool = True, learned: bool = False, **options: Any) -> None:
        super().__init__(site, **options)
        self.differentiable = differentiable
        self.router = nn.Linear(self.qk_dim, self.qk_dim) if learned else nn.Identity()

    def choose(self, means: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (self.router(part) for part in (means if self.differentiable else means.detach()).chunk(2, -1))
        scores, routes = (self.scale * q @ k.transpose(1, 2)).topk(self.count(means), -1)
        weights = scores.softmax(-1).flatten(0, 1)[..., None, None]  # (B R, K, 1, 1)
        chosen = gather_regions(kv, routes).unflatten(1, (-1, kv.shape[1]))
        return routes, (chosen * weights).flatten(1, 2)

    def _cost(self, grid: Grid, projected: Grid) -> int:
        learned = 0 if isinstance(self.router, nn.Identity) else 2 * self.regions ** len(grid) * self.qk_dim**2
        return super()._cost(grid, projected) + learned


class LatePaddedRouting(BiLevelRouting):
    """Bi-level routing as the authors wrote it anew (their NCHW code): other numbers where S does not divide the grid.

    A region has floor(size / S) tokens a side, and there are S or more of them; q, k and v are zero-padded after their
    projection. Padded tokens do not count in the means, are attended to without a mask, and the convolution does not
    see them.
    """

    def layout(self, grid: Grid) -> tuple[Grid, Grid]:
        side: Grid = tuple(larger(size // self.regions, 1) for size in grid)
        return side, tuple(ceil_div(size, part) * part for size, part in zip(grid, side, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        side, padded = self.layout(grid)
        qkv = self.qkv(x)
        inside = partition(pad_to(qkv, padded), side)
        real = (region_tokens(grid, side, padded, x.device) >= 0).sum(1, keepdim=True)  # (R, 1)
        means = inside[..., : 2 * self.qk_dim].sum(1).unflatten(0, (x.shape[0], -1)) / real
        out = crop(merge(self.attend(inside, means, grid), side, padded), grid)
        return self.proj(out + self.local(qkv[..., 2 * self.qk_dim :]))

    def cost(self, site: Site, grid: Grid) -> int:
        return self._cost(grid, grid)


class EnhancedAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v + conv(x)) over all tokens: the last stage. conv(v) where `of_values`."""

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")

    def __init__(self, site: Site, kernel: int = 5, heads: int = 8, of_values: bool = False) -> None:
        super().__init__()
        check_heads(replace(site, heads=heads))
        self.heads, self.kernel, self.of_values = heads, kernel, of_values
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.local = depthwise(site.rank, site.dim, kernel)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=lambda: global_tokens(q.shape[-2], x.device))
        out = out.transpose(1, 2).reshape(x.shape)
        return self.proj(out + self.local(qkv.chunk(3, -1)[2] if self.of_values else x))

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds of N tokens: projections 4 N C^2, attention 2 N^2 C, convolution N C kernel^rank."""
        return prod(grid) * site.dim * (4 * site.dim + 2 * prod(grid) + self.kernel ** len(grid))


def gather_regions(kv: Tensor, routes: Tensor) -> Tensor:
    """The tokens of the chosen regions side by side: kv (B R, N, D), routes (B, R, K) -> (B R, K N, D). One gather."""
    B, R, K = routes.shape
    first = torch.arange(B, device=routes.device).view(B, 1, 1) * R
    return kv.index_select(0, (routes + first).flatten()).view(B * R, K * kv.shape[1], kv.shape[2])


def pad_to(x: Tensor, padded: Grid) -> Tensor:
    """Zero-pad the end of each axis of (B, *grid, C)."""
    return pad_end(x, [full - size for full, size in zip(padded, x.shape[1:-1], strict=True)])


@table
def region_tokens(grid: Grid, side: Grid, padded: Grid, device: torch.device) -> Tensor:
    """(R, N) number of the grid's token at each place of each region of the padded grid; -1 for padding."""
    numbers = torch.arange(1, prod(grid) + 1, device=device).view(1, *grid, 1)
    return partition(pad_to(numbers, padded), side).squeeze(-1) - 1


def halve(rank: int, dim: int, out_dim: int) -> list[nn.Module]:
    """A 3x3 convolution of stride 2 and a batch norm."""
    return conv_norm(rank, dim, out_dim, stride=2, bias=True)


SIZES: dict[str, dict[str, Any]] = {
    "biformer_tiny": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2)),
    "biformer_small": dict(dims=(64, 128, 256, 512), depths=(4, 4, 18, 4)),
    "biformer_base": dict(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4)),
    "biformer_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), topks=(2, 4, None), regions=4, patch=2, img_size=32),
    "biformer_stl": dict(builder="biformer_stl", dims=(96, 192, 384, 768), depths=(2, 2, 6, 2)),
    "biformer_stl_nchw": dict(builder="biformer_stl", dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), late_padding=True),
}


def biformer(
    dims: Sequence[int],
    depths: Sequence[int],
    topks: Sequence[int | None] = (1, 4, 16, None),
    regions: int = 7,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A BiFormer of a size, heads of 32 channels; `topks` regions are attended to in each stage (None: full attention).

    For dense prediction the authors set `regions` to 8 (segmentation at 512) or 16 (detection).
    """
    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        if patch == 2:
            return ConvStem(*halve(rank, in_chans, dim))
        return ConvStem(*halve(rank, in_chans, dim // 2), Gelu(), *halve(rank, dim // 2, dim))

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        position = depthwise(site.rank, site.dim, 3)
        return Block(site, mixer, drop_path=drop_path, mlp=partial(Mlp, ratio=3), position=position)

    mixers = [partial(BiLevelRouting, regions=regions, topk=topk) if topk else EnhancedAttention for topk in topks]
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch,
        downsample=lambda *sizes: nn.Sequential(*halve(*sizes)), block=block, mixer=mixers, norm=BatchNorm,
        replace=mixer, **common,
    )


def biformer_stl(
    dims: Sequence[int],
    depths: Sequence[int],
    topks: Sequence[int | None] = (1, 4, 16, None),
    regions: int = 7,
    late_padding: bool = False,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """The paper's ablation: bi-level routing in the layout of Swin-T (patches, no convolutional position)."""
    routing = LatePaddedRouting if late_padding else BiLevelRouting
    full = partial(EnhancedAttention, of_values=late_padding)
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=lambda rank, in_chans, dim: ConvStem(
            grid_conv(rank, in_chans, dim, 4, stride=4), BatchNorm(dim), least=4),
        downsample=partial(NormedMerging, norm=BatchNorm),
        block=Block, mixer=[partial(routing, regions=regions, topk=topk) if topk else full for topk in topks],
        norm=BatchNorm, replace=mixer, **common,
    )


def inside(theirs: str, ours: str, rules: KeyMap) -> KeyMap:
    """The rules of a module, for where it is a part of another."""
    return [(theirs + rule[0], f"{ours}{rule[1]}", *rule[2:]) for rule in rules]


MIXER: KeyMap = (
    (r"qkv(\.qkv|_linear)?\.weight", "qkv.weight", matrix_from_1x1),
    (r"qkv(\.qkv|_linear)?\.bias", "qkv.bias"),
    (r"(wo|proj|output_linear)\.weight", "proj.weight", matrix_from_1x1),
    (r"(wo|proj|output_linear)\.bias", "proj.bias"),
    (r"lepe\.(?P<rest>.*)", r"local.\g<rest>"),
    (r"router\.emb\.(?P<rest>.*)", r"router.\g<rest>"),
)
BLOCK: KeyMap = (
    *inside(r"attn\.", "mixer.", MIXER),
    (r"pos_embed\.(?P<rest>.*)", r"position.\g<rest>"),
    (r"mlp\.0\.weight", "mlp.fc1.weight", matrix_from_1x1),
    (r"mlp\.0\.bias", "mlp.fc1.bias"),
    (r"mlp\.[23]\.weight", "mlp.fc2.weight", matrix_from_1x1),
    (r"mlp\.[23]\.bias", "mlp.fc2.bias"),
    (r"(?P<rest>norm\d\..*)", r"\g<rest>"),
)
AUTHORS: KeyMap = (
    (r"downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    *inside(r"stages\.(?P<stage>\d+)\.(blocks\.)?(?P<block>\d+)\.", r"stages.\g<stage>.blocks.\g<block>.", BLOCK),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {f"stage{number}": f"stages.{number - 1}" for number in range(1, 5)}
