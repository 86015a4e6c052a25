"""FcaFormer: a block's attention also sees tokens that earlier blocks of its stage have left.

Behind its attention each block merges its map into a few cross tokens, a depthwise 7x7 convolution of stride 4; later
blocks of the stage take them as further keys and values, calibrated by a learned factor and bias a token:
    s = [conv_1(x_1); ...; conv_{l-1}(x_{l-1})],   k, v = kv([norm(x); norm_s(alpha s)]),
    out_i = softmax_j(q_i . k_j / sqrt(d) + b_ij) v_j,   b_ij = b[|i - j|] among tokens, beta_j of a cross token,
so that only as many tokens come out as went in. A depthwise 3x3 convolution then enhances the map before its MLP. The
first two stages are ConvNeXt's.

Zhang, Hu, Wang, "Fcaformer: Forward Cross Attention in Hybrid Vision Transformer", 2023, section 3.

Any grid: the tables of |offsets|, factors and biases are resampled (linearly) to the grid that comes; convolutions pad
with zeros.
Quirks kept: two layer norms in a row before the MLP; the enhancement has no shortcut; queries, keys and values of cross
tokens share one projection with the tokens' (their queries are not computed here).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.toeplitz import attend_at_offsets, toeplitz
from saccade.parts.attention import check_heads
from saccade.parts.block import Block, SingleBlock
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.head import Head
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.position import LINEAR, is_native
from saccade.parts.pyramid import Pyramid, Stage
from saccade.parts.stem import ConvStem

CARD = Card(
    "Fcaformer: Forward Cross Attention in Hybrid Vision Transformer",
    authors="Zhang, Hu, Wang",
    year=2023,
    systems=("fcaformer",),
    arxiv="2211.07198",
    code="hkzhang-git/FcaFormer@7dcd8e0",
    read="paper",
    keywords="forward cross attention, cross tokens, token merge and enhancement, learnable scale factors, hybrid",
    kinds=("backbone", "mixer"),
    mixers={"forward_cross_attention": "CrossAttention"},
    params={"fcaformer_l1": 6.2e6},
    macs={"fcaformer_l1": 1.4e9},
    top1={"fcaformer_l1": 80.3},
    goldens=("fcaformer_l1", "op_fca_block", "op_fca_stage"),
    tests=("tests/papers/test_fcaformer.py",),
)

MERGE = 4  # stride of the convolution that makes cross tokens


class CrossAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + b) v), keys among all tokens and the cross tokens of `sources` blocks.

    (B, *grid, C) and, for `sources` > 0, `context` (B, sources x cells, C), oldest first, -> (B, *grid, C).
    """

    ranks, context, weights = (1, 2, 3), True, True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset, also to tokens of earlier blocks", "softmax", "sum of v")

    def __init__(self, site: Site, sources: int = 0) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.grid, self.sources = site.heads, site.grid, sources
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.bias = nn.Parameter(torch.zeros(site.heads, prod(site.grid)))
        self.proj = nn.Linear(site.dim, site.dim)
        self.undecayed: tuple[str, ...] = ("bias",)
        if sources:
            self.scale = nn.Parameter(torch.ones(1, sources * prod(cells(site.grid))))
            self.cross_norm = nn.LayerNorm(site.dim)
            self.cross_bias = nn.Parameter(torch.zeros(site.heads, self.scale.shape[1]))
            self.undecayed = ("bias", "scale", "cross_bias")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x.flatten(1, -2)).chunk(3, -1)
        offsets, bias = self.offsets(grid), None
        if context is not None:
            if not self.sources:
                raise SaccadeError("cross tokens for an attention of sources=0: build it with their number of blocks")
            width = x.shape[-1]
            scale, cross_bias = (spread(value, self.sources, cells(self.grid), cells(grid))
                                 for value in (self.scale, self.cross_bias))
            cross = self.cross_norm(context * scale[..., None])
            k_cross, v_cross = F.linear(cross, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
            k, v = torch.cat([k, k_cross], 1), torch.cat([v, v_cross], 1)
            bias = torch.cat([toeplitz(offsets, grid), cross_bias[:, None].expand(-1, q.shape[1], -1)], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        sources = 0 if context is None else self.sources

        def where() -> tuple[Tensor, Tensor]:
            return cross_tokens(grid, sources, x.device)

        out = (attend(q, k, v, bias, where=where) if bias is not None
               else attend_at_offsets(q, k, v, offsets, grid, where=where))
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def offsets(self, grid: tuple[int, ...]) -> Tensor:
        """The bias (heads, *(2 side - 1)) an offset between two tokens of a grid: that of how far they lie apart."""
        bias = spread(self.bias, 1, self.grid, grid, corners=True).unflatten(1, grid)
        for axis in range(1, bias.ndim):
            bias = torch.cat([bias.narrow(axis, 1, bias.shape[axis] - 1).flip(axis), bias], axis)
        return bias

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """A table of a square grid of another side, for this one's."""
        rank, sources = len(self.grid), 1 if parameter == "bias" else self.sources
        side = round((value.shape[1] / sources) ** (1 / rank))
        if sources * side**rank != value.shape[1]:
            return value
        if parameter == "bias":
            return spread(value, 1, (side,) * rank, self.grid, corners=True)
        return spread(value, sources, (side,) * rank, cells(self.grid))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds with N tokens and M cross tokens: (4 N + 2 M) C^2 + 2 N (N + M) C."""
        tokens, cross = prod(grid), self.sources * prod(cells(grid))
        return (4 * tokens + 2 * cross) * site.dim**2 + 2 * tokens * (tokens + cross) * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def cells(grid: tuple[int, ...]) -> tuple[int, ...]:
    """How many cross tokens a grid gives on each axis."""
    return tuple((side - 1) // MERGE + 1 for side in grid)


def spread(
    value: Tensor, sources: int, native: tuple[int, ...], grid: tuple[int, ...], corners: bool = False
) -> Tensor:
    """(h, sources x prod(native)) -> (h, sources x prod(grid)), resampled linearly; `corners` keep their entries."""
    if is_native(grid, native):
        return value
    parts = value.unflatten(1, (sources, *native))
    return F.interpolate(parts, size=grid, mode=LINEAR[len(grid)], align_corners=corners).flatten(1)


@table
def cross_tokens(grid: tuple[int, ...], sources: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`where` of the tokens, followed by cross tokens, each at the token in its middle."""
    numbers = torch.arange(prod(grid), device=device)
    middles = numbers.view(grid)[(slice(None, None, MERGE),) * len(grid)].flatten()
    return numbers[None], torch.cat([numbers, middles.repeat(sources)])[None]


class CrossBlock(Block):
    """x += mixer(norm(x), cross); new = merge(x); x = enhance(x); x += mlp(norm(norm(x))): a map and its cross tokens.

    `merges` is False in the last block of a stage, whose cross tokens nobody would see: it gives None.
    """

    def __init__(self, site: Site, mixer: nn.Module, *, merges: bool, drop_path: float = 0.0) -> None:
        super().__init__(site, mixer, drop_path=drop_path, norm=nn.LayerNorm, layer_scale=1e-6,
                         mlp=lambda dim: nn.Sequential(nn.LayerNorm(dim), Mlp(dim)))
        self.merge = grid_conv(site.rank, site.dim, site.dim, 7, stride=MERGE, padding=3, groups=site.dim,
                               bias=False) if merges else None
        self.enhance = nn.Sequential(*conv_norm(site.rank, site.dim, site.dim, groups=site.dim))

    def forward(  # type: ignore[override]
        self, x: Tensor, cross: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        crossing = isinstance(self.mixer, CrossAttention) and self.mixer.sources > 0
        normed = self.norm1(x)
        x = x + self.scale1(self.mixer(normed, cross) if crossing else self.mixer(normed))
        new = self.merge(x).flatten(1, -2) if self.merge is not None else None
        x = self.enhance(x)
        return x + self.scale2(self.mlp(self.norm2(x))), new


class CrossStage(Stage):
    """A stage whose blocks are given the cross tokens of the `keep` blocks before them."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], keep: int) -> None:
        super().__init__(downsample, blocks)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        left: list[Any] = []
        x = self.downsample(x)
        for block in self.blocks:
            x, new = block(x, torch.cat(left[-self.keep:], 1) if left else None)
            left.append(new)
        return x


class Merging(nn.Sequential):
    """A linear layer to the new width, a depthwise 3x3 convolution of stride 2, a linear layer; norms, GELU between."""

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(dim, out_dim, bias=False), BatchNorm(out_dim), Gelu(),
            *conv_norm(rank, out_dim, out_dim, stride=2, groups=out_dim), Gelu(),
            nn.Linear(out_dim, out_dim, bias=False), BatchNorm(out_dim),
        )


SIZES: dict[str, dict[str, Any]] = {
    "fcaformer_l1": dict(dims=(64, 128, 192, 320), depths=(2, 2, 6, 2)),
    "fcaformer_nano": dict(dims=(32, 64, 128), depths=(1, 3, 2), crossing=1, keep=1, patch=2, img_size=32),
}


def fcaformer(
    dims: Sequence[int],
    depths: Sequence[int],
    crossing: int = 2,
    keep: int = 12,
    head_dim: int = 32,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """An FcaFormer of a size, `patch` 4 or 2; stages from `crossing` on have cross tokens, of `keep` blocks at most."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        return ConvStem(*conv_norm(rank, in_chans, dim // 2, stride=2), Gelu(),
                        *conv_norm(rank, dim // 2, dim, stride=patch // 2))

    def own(site: Site) -> nn.Module:
        if site.stage < crossing:
            return depthwise(site.rank, site.dim, 7)
        return CrossAttention(site, min(site.index, keep))

    def block(site: Site, mixer: nn.Module, drop_path: float) -> nn.Module:
        if site.stage < crossing:
            return SingleBlock(site, mixer, drop_path=drop_path)
        return CrossBlock(site, mixer, merges=site.index < depths[site.stage] - 1, drop_path=drop_path)

    model = Pyramid(
        dims, depths, [max(dim // head_dim, 1) for dim in dims], stem=stem, stride=patch, downsample=Merging,
        block=block, mixer=own, head=partial(Head, norm=nn.LayerNorm), replace=mixer, **common,
    )
    for number in range(crossing, len(dims)):
        stage: Any = model.stages[number]
        model.stages[number] = CrossStage(stage.downsample, stage.blocks, keep)
    return model


BLOCK: KeyMap = (
    (r"gamma_(\d)", r"scale\1.0.gamma"),
    (r"attention_biases", "mixer.bias"),
    (r"s_token_bias", "mixer.cross_bias", lambda value: value[0, :, 0]),
    (r"s_scale_factors", "mixer.scale", lambda value: value[..., 0]),
    (r"s_norm\.(.*)", r"mixer.cross_norm.\1"),
    (r"(qkv|proj)\.(.*)", r"mixer.\1.\2"),
    (r"dw_conv\.(.*)", r"merge.\1"),
    (r"local_conv\.c\.(.*)", r"enhance.0.\1"),
    (r"local_conv\.bn\.(.*)", r"enhance.1.\1"),
    (r"mlp\.norm\.(.*)", r"mlp.0.\1"),
    (r"mlp\.(fc\d\..*)", r"mlp.1.\1"),
    (r"(norm\d\..*)", r"\1"),
    (r"dwconv\.(.*)", r"mixer.\1"),  # from here, ConvNeXt's
    (r"pwconv(\d)\.(.*)", r"mlp.fc\1.\2"),
    (r"gamma", "scale.0.gamma"),
    (r"norm\.(.*)", r"norm.\1"),
    Dropped(r"attention_bias_idxs", "derived buffer"),
)
_MERGING: KeyMap = tuple(rule for number in (1, 2, 3) for rule in (
    (rf"conv{number}\.c\.(.*)", rf"{3 * number - 3}.\1", pointwise),
    (rf"conv{number}\.bn\.(.*)", rf"{3 * number - 2}.\1")))
AUTHORS: KeyMap = (
    *(rule for theirs, ours in ((0, 0), (2, 3)) for rule in (
        (rf"patch_embed\.seq\.{theirs}\.c\.(.*)", rf"stem.{ours}.\1"),
        (rf"patch_embed\.seq\.{theirs}\.bn\.(.*)", rf"stem.{ours + 1}.\1"))),
    *within(BLOCK, r"layer_(\d)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
    *(rule for stage in range(3) for rule in within(
        _MERGING, rf"layer_{stage}\.downsample\.", f"stages.{stage + 1}.downsample.")),
    (r"norm_head\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
# The authors' stage outputs are taken after the downsampling that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
