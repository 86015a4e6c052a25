"""DCT-HistoTransformer: attention among the low frequencies of a map, beside a mobile convolution of it.

Stained tissue is large and its classes are in its texture. Each block has two branches: one takes the cosine transform
of the map, keeps the lowest frequencies, lets them attend to each other and transforms back,
    F = low(DCT(X));   Y = DCT^-1(F + attention(norm(F) + position)),
the other is an inverted residual on the map itself; a 1x1 convolution joins them. Half of the frequencies a side make
attention sixteen times cheaper.

Ranjbar, Mohebbi, Cherakhloo, Vosoughi Vahdat, "DCT-HistoTransformer: Efficient Lightweight Vision Transformer with DCT
Integration for histopathological image analysis", 2024.

Any grid: a share of each side is kept, rounded up; positions of frequencies are resampled to as many. The transform is
computed in float32 at least.
No code of the model is public. The two branches, the transform, the low-pass filter and the accuracies (BreakHis, two
classes 96.0 %, eight 87.9 %) are the paper's. Ours, because the rest was not at hand: every size (widths, depths, four
heads, half a side), the shortcut and the positions of the frequencies, the zeros beyond them on the way back, the join,
MobileNetV2's form of the convolution (ratio 4, SiLU), and that the first stage, whose map is large, has it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.cosine import cosine_transform, inverse_cosine_transform
from saccade.ops.sizes import ceil_div, smaller
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, residual_tail
from saccade.parts.convolution import conv_norm
from saccade.parts.mbconv import InvertedResidual
from saccade.parts.norm import BatchNorm
from saccade.parts.position import Position
from saccade.parts.pyramid import Pyramid, no_mixer
from saccade.parts.stem import ConvStem

CARD = Card(
    "DCT-HistoTransformer: Efficient Lightweight Vision Transformer with DCT Integration for histopathological image "
    "analysis",
    authors="Ranjbar, Mohebbi, Cherakhloo, Vosoughi Vahdat",
    year=2024,
    systems=("dct_histo",),
    arxiv="2410.19166",
    read="paper (abstract, a review)",
    keywords="discrete cosine transform attention, low-pass, frequency, MobileConv, histopathology, BreakHis",
    kinds=("backbone", "mixer"),
    mixers={"dct_attention": "DctAttention"},
    aliases={"dct_histotransformer": "dct_histo"},
    tests=("tests/papers/test_dct_histo.py", "tests/ops/test_cosine.py"),
)


class DctAttention(nn.Module):
    """out = DCT^-1(F + proj(softmax(q k^T / sqrt(d)) v)), q, k, v = qkv(norm(F) + position), F = low(DCT(x)).

    (B, *grid, C) -> (B, *grid, C), with no frequency beyond those kept. `keep` is the share of each side's frequencies
    or, above 1, their number. Raises SaccadeError where it is neither, or the heads do not divide the width.
    """

    ranks, weights = (1, 2, 3), True
    template = Template(
        "q k^T / sqrt(d) among low frequencies of the cosine transform", "softmax", "sum of v, transformed back"
    )

    def __init__(self, site: Site, keep: float = 0.5) -> None:
        super().__init__()
        check_heads(site)
        if keep <= 0 or (keep > 1 and keep != int(keep)):
            raise SaccadeError(f"keep={keep}: give a share of the frequencies, up to 1, or a whole number of them")
        self.heads = site.heads
        self.keep = Fraction(keep).limit_denominator(1000)
        self.norm = LAYER_NORM(site.dim)
        self.position = Position(site.dim, self.kept(site.grid), linear=True)
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        low = cosine_transform(x, self.kept(grid))
        tokens = self.position(self.norm(low.to(x.dtype)))
        q, k, v = self.qkv(tokens).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # frequencies are no tokens of the grid: no `where`
        return inverse_cosine_transform(low + self.proj(mixed).view(low.shape), grid).to(x.dtype)

    def kept(self, grid: Sequence[int]) -> tuple[int, ...]:
        """How many frequencies of each axis attend."""
        if self.keep > 1:
            return tuple(smaller(side, int(self.keep)) for side in grid)
        return tuple(ceil_div(side * self.keep.numerator, self.keep.denominator) for side in grid)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 T C^2 + 2 T^2 C for T kept frequencies, and the products with cosines there and back."""
        kept = self.kept(grid)
        tokens = prod(kept)
        there = sum(prod(kept[:axis]) * kept[axis] * prod(grid[axis:]) for axis in range(len(grid)))
        return site.dim * (4 * tokens * site.dim + 2 * tokens**2 + 2 * there)

    def reach(self, site: Site) -> None:
        """Every token reaches every other: a frequency is of the whole map."""
        return None


class DctConvBlock(nn.Module):
    """join([mixer(x), local(x)]), local an inverted residual; local(x) alone where there is no mixer.

    Drop path drops the mixer's branch.
    """

    def __init__(self, site: Site, mixer: nn.Module | None, drop_path: float = 0.0, ratio: int = 4) -> None:
        super().__init__()
        self.site = site
        self.local = inverted(ratio, site.rank, site.dim, site.dim)
        self.mixer = mixer
        if mixer is not None:
            self.tail = residual_tail(site.dim, None, drop_path)
            self.join = nn.Sequential(nn.Linear(2 * site.dim, site.dim, bias=False), BatchNorm(site.dim))

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        if self.mixer is None:
            return local
        return self.join(torch.cat([self.tail(self.mixer(x)), local], -1))


def inverted(ratio: int, rank: int, dim: int, out_dim: int, stride: int = 1) -> InvertedResidual:
    """The paper's MobileConv, and between stages its form that strides and widens."""
    return InvertedResidual(rank, dim, out_dim, ratio * dim, stride=stride, activation=nn.SiLU)


SIZES: dict[str, dict[str, Any]] = {
    "dct_histo": dict(dims=(32, 64, 128, 256), depths=(1, 2, 2, 2), num_classes=2),
    "dct_histo_nano": dict(dims=(16, 32, 64), depths=(1, 2, 2), img_size=32),
}


def dct_histo(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: int = 4,
    keep: float = 0.5,
    ratio: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A DCT-HistoTransformer of a size, of strides 2, 4, ...; the first stage has convolutions alone."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        return ConvStem(*conv_norm(rank, in_chans, dim, stride=2), nn.SiLU())

    mixers: list[Any] = [no_mixer, *[partial(DctAttention, keep=keep)] * (len(depths) - 1)]
    return Pyramid(
        dims, depths, [heads] * len(dims), stem=stem, stride=2, downsample=partial(inverted, ratio, stride=2),
        block=partial(DctConvBlock, ratio=ratio), mixer=mixers, replace=mixer, **common,
    )
