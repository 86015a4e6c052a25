"""HorNet: gated convolutions, gate after gate, for interactions of high order.

A gate, p * conv(q), lets a token interact with its neighbours once. g^nConv repeats it on ever wider channel groups:
    (p_0, q_0, ..., q_(n-1)) = W_in x,   p_(k+1) = W_k(p_k) * conv(q_k) s,   out = W_out p_n,
with C / 2^(n-1), ..., C / 2, C channels, so that the cost stays that of one wide gate. conv is one depthwise 7x7 for
all groups, or, in late stages, a global filter in the frequency domain for half of the channels and a 3x3 for the rest.
The blocks are a Transformer's, the pyramid ConvNeXt's.

Rao, Zhao, Tang, Zhou, Lim, Lu, "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
2022, section 3.

Any grid: convolutions pad with zeros, the filter wraps around; a filter of another grid is resampled (linearly, corners
aligned). Between stages a last odd row or column is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.spectral import global_filter, resample_spectrum, spectrum_size
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise
from saccade.parts.head import Head
from saccade.parts.merging import NormedMerging
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_PUBLISHED = tuple(f"hornet_{size}_{kind}" for size in ("tiny", "small", "base", "large") for kind in ("7x7", "gf"))

CARD = Card(
    "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
    authors="Rao, Zhao, Tang, Zhou, Lim, Lu",
    year=2022,
    systems=("hornet",),
    arxiv="2207.14284",
    code="raoyongming/HorNet@ac9e210",
    licence="MIT",
    read="paper",
    keywords="recursive gated convolution, gnConv, high-order spatial interaction, global filter, HorFPN",
    kinds=("backbone", "mixer"),
    mixers={"recursive_gated_convolution": "GatedConvolution"},
    params=dict(zip(_PUBLISHED, (22e6, 23e6, 50e6, 50e6, 87e6, 88e6, 195e6, 196e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (4.0e9, 3.9e9, 8.8e9, 8.7e9, 15.6e9, 15.5e9, 34.8e9, 34.7e9), strict=True)),
    top1=dict(zip(_PUBLISHED[:6], (82.8, 83.0, 83.8, 84.0, 84.2, 84.3), strict=True)),
    weights={  # the large ones know ImageNet-22K's classes
        name: Weights(f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1",
                      data="ImageNet-22K" if "_large" in name else "ImageNet-1K")
        for name, share in (
            ("hornet_tiny_7x7", "bac9690c72944d19aca1"), ("hornet_tiny_gf", "460e759c82324ea6bfa3"),
            ("hornet_small_7x7", "8ef64277da0e469ea857"), ("hornet_small_gf", "959603ca287d4c09ad49"),
            ("hornet_base_7x7", "13a748487711492e9704"), ("hornet_base_gf", "c212d1d8a3914b47a5c1"),
            ("hornet_large_7x7", "c2fc23caae084a3aa73d"), ("hornet_large_gf", "8600206ebdfa485f98d0"),
            ("hornet_large_gf_img384", "eec48d5eca5a48d98fd2"),
        )
    },
    goldens=("hornet_tiny_7x7", "hornet_tiny_gf", "op_gnconv", "op_gnconv_gf", "op_global_local_filter"),
)


class GlobalLocalFilter(nn.Module):
    """norm(conv_3x3(a) and filter(b), channel by channel in turn), a and b the halves of norm(x), on (B, *grid, C).

    The filter (*frequencies, C / 2, 2) belongs to the native grid.
    """

    undecayed = ("filter",)

    def __init__(self, grid: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LAYER_NORM(dim), LAYER_NORM(dim)
        self.local = depthwise(len(grid), dim // 2, 3, bias=False)
        self.filter = nn.Parameter(torch.randn(*spectrum_size(grid), dim // 2, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm1(x).chunk(2, -1)
        return self.norm2(torch.stack([self.local(a), global_filter(b, self.filter)], -1).flatten(-2))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        return resample_spectrum(value, tuple(self.filter.shape[:-2]))


class GatedConvolution(nn.Module):
    """out = W_out p_n, p_(k+1) = W_k(p_k) * scale conv(q_k), (p_0, q_0, ...) = W_in x: (B, *grid, C) -> (B, *grid, C).

    `order` is n; `spectral` puts a global filter and a 3x3 in the place of the 7x7. (Rao et al., 2022, equation 3.3.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i], or a filter of all frequencies", "none", "sum of q_k, times p_k, again and again")

    def __init__(self, site: Site, order: int = 5, scale: float = 1 / 3, spectral: bool = False) -> None:
        super().__init__()
        self.widths = [site.dim // 2**step for step in reversed(range(order))]
        self.scale, self.spectral = scale, spectral
        total = sum(self.widths)
        self.enter = nn.Linear(site.dim, self.widths[0] + total)
        self.conv = GlobalLocalFilter(site.grid, total) if spectral else depthwise(site.rank, total, 7)
        self.gates = nn.ModuleList(nn.Linear(*pair) for pair in zip(self.widths, self.widths[1:], strict=False))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.enter(x).split((self.widths[0], sum(self.widths)), -1)
        first, *others = (self.conv(q) * self.scale).split(self.widths, -1)
        p = p * first
        for gate, other in zip(self.gates, others, strict=True):
            p = gate(p) * other
        return self.proj(p)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N tokens: projections, gates, and the convolution (Fourier transforms not counted)."""
        total = sum(self.widths)
        linear = site.dim * (self.widths[0] + total + site.dim)
        linear += sum(a * b for a, b in zip(self.widths, self.widths[1:], strict=False))
        conv = total // 2 * 3**site.rank if self.spectral else total * 7**site.rank
        return prod(grid) * (linear + conv)

    def reach(self, site: Site) -> tuple[int, ...] | None:
        """One convolution, whatever the order; everywhere with a global filter."""
        return None if self.spectral else (3,) * site.rank


class HorFPN(nn.Module):
    """A feature pyramid whose smoothing convolutions are recursive gated convolutions, in residual form.

    Maps (B, C_i, *grid_i), finest first -> maps (B, out, *grid_i):
        m_i = W_i x_i + upsampled m_(i+1),   out_i = m_i + gnConv(norm(m_i)).
    Source: Rao et al., HorNet, 2022, section 3.3 (HorFPN); the residual form of the smoothing is ours: the text says
    only that g^nConv replaces the 3x3 convolutions.
    """

    def __init__(self, dims: Sequence[int], out_dim: int, order: int = 5, rank: int = 2) -> None:
        super().__init__()
        site = Site(out_dim, grid=(14,) * rank)
        self.lateral = nn.ModuleList(nn.Linear(dim, out_dim) for dim in dims)
        self.norms = nn.ModuleList(LAYER_NORM(out_dim) for _ in dims)
        self.smooth = nn.ModuleList(GatedConvolution(site, order) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(x.movedim(1, -1)) for lateral, x in zip(self.lateral, maps, strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            coarse, size = merged[finer + 1].movedim(-1, 1), merged[finer].shape[1:-1]
            merged[finer] = merged[finer] + F.interpolate(coarse, size=size, mode="nearest").movedim(1, -1)
        return [(x + smooth(norm(x))).movedim(-1, 1)
                for x, norm, smooth in zip(merged, self.norms, self.smooth, strict=True)]


_SEVEN = (False,) * 4
_GF = (False, False, True, True)
SIZES: dict[str, dict[str, Any]] = {
    f"hornet_{size}_{kind}": dict(dims=tuple(dim * 2**stage for stage in range(4)), spectral=spectral)
    for size, dim in (("tiny", 64), ("small", 96), ("base", 128), ("large", 192))
    for kind, spectral in (("7x7", _SEVEN), ("gf", _GF))
}
SIZES |= {
    "hornet_large_gf_img384": SIZES["hornet_large_gf"] | dict(img_size=384),
    "hornet_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), spectral=(False, False, True), patch=2, img_size=32),
}


def hornet(
    dims: tuple[int, ...],
    depths: tuple[int, ...] = (2, 3, 18, 2),
    orders: tuple[int, ...] = (2, 3, 4, 5),
    spectral: tuple[bool, ...] = _SEVEN,
    layer_scale: float | None = 1e-6,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A HorNet of a size; `spectral` says which stages have global filters."""
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=patch, stride=patch, norm=LAYER_NORM), stride=patch,
        downsample=partial(NormedMerging, norm=LAYER_NORM), block=partial(Block, layer_scale=layer_scale),
        mixer=[partial(GatedConvolution, order=order, spectral=wide)
               for order, wide in zip(orders, spectral, strict=False)],
        head=partial(Head, norm=LAYER_NORM), replace=mixer, **common,
    )


def _frequencies_first(weight: Tensor) -> Tensor:
    """The authors' filter (C, *frequencies, 2) as ours."""
    return weight.movedim(0, -2)


FILTER: KeyMap = (
    ("complex_weight", "filter", _frequencies_first),
    (r"dw\.(.*)", r"local.\1"),
    (r"pre_norm\.(.*)", r"norm1.\1"),
    (r"post_norm\.(.*)", r"norm2.\1"),
)
MIXER: KeyMap = (
    *(rule for theirs, ours in (("proj_in", "enter"), ("proj_out", "proj"))
      for rule in ((rf"{theirs}\.weight", f"{ours}.weight", matrix_from_1x1), (rf"{theirs}\.bias", f"{ours}.bias"))),
    (r"pws\.(\d+)\.weight", r"gates.\1.weight", matrix_from_1x1),
    (r"pws\.(\d+)\.bias", r"gates.\1.bias"),
    *within(FILTER, r"dwconv\.", "conv."),
    (r"dwconv\.(.*)", r"conv.\1"),
)
_BLOCK = r"stages\.(\d+)\.(\d+)\."
AUTHORS: KeyMap = (
    *within(MIXER, _BLOCK + r"gnconv\.", r"stages.\1.blocks.\2.mixer."),
    (_BLOCK + r"gamma(\d)", r"stages.\1.blocks.\2.scale\3.0.gamma"),
    (_BLOCK + r"pwconv(\d)\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (_BLOCK + r"(norm\d)\.(.*)", r"stages.\1.blocks.\2.\3.\4"),
    (r"downsample_layers\.0\.0\.(.*)", r"stem.proj.\1"),
    (r"downsample_layers\.0\.1\.(.*)", r"stem.norm.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
