"""SVT: early layers work on the wavelet coefficients of the map, and no detail is lost.

A dual-tree complex wavelet transform T takes the map apart in a smooth part and details at six orientations; the smooth
part is weighed place by place, the details mix their channels in a small complex MLP, in four blocks of C / 4,
    low, high = T(x),   out = T^-1(w * low, W_2 relu(W_1 high + b_1) + b_2),
and the inverse puts the map together again. Attention follows, in the later stages of Wave-ViT's pyramid. A second form
leaves half of the channels to a 3x3 convolution and mixes the details of each row across the map as well.

Patro, Agneeswaran, "Scattering Vision Transformer: Spectral Mixing Matters", 2023, section 2.

Any grid: an odd side is made even by repeating its last row. Weights that belong to the native grid are resampled
(those of places bicubic, those of rows linearly); the authors' code runs on the native grid alone.
Quirks kept: the published models scatter in the first stage only, and without mixing of rows; they cost a quarter more
multiply-adds than published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.wavelet import dtcwt, inverse_dtcwt
from saccade.parts.attention import Attention
from saccade.parts.convolution import depthwise
from saccade.parts.labelled_pyramid import LabelledPyramid, wavevit_names
from saccade.parts.position import is_native, resample

_PUBLISHED = ("svt_s", "svt_b", "svt_l")

CARD = Card(
    "Scattering Vision Transformer: Spectral Mixing Matters",
    authors="Patro, Agneeswaran",
    year=2023,
    systems=("svt",),
    arxiv="2311.01310",
    code="badripatro/svt@fcbc9b3",
    licence="unknown",
    read="paper",
    keywords="scattering, dual-tree complex wavelet transform, DTCWT, spectral gating, Einstein blending, "
             "token labelling",
    kinds=("backbone", "mixer"),
    mixers={"scattering": "Scattering", "row_scattering": "RowScattering"},
    params=dict(zip(_PUBLISHED, (22.0e6, 32.8e6, 54.0e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (3.9e9, 6.3e9, 12.7e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (84.2, 85.2, 85.7), strict=True)),
    goldens=("svt_s", "op_svt_channel_mixing", "op_svt_channel_token_mixing", "op_dtcwt_forward_j1"),
    tests=("tests/papers/test_svt.py", "tests/ops/test_wavelet.py"),
)


class ComplexMlp(nn.Module):
    """W_2 relu(W_1 z + b_1) + b_2, relu on real and imaginary parts, other weights a group.

    z and the result are (groups, T, 2 width), real parts before imaginary ones.
    """

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.weight1, self.weight2 = (nn.Parameter(torch.randn(2, groups, width, width) * 0.02) for _ in range(2))
        self.bias1, self.bias2 = (nn.Parameter(torch.randn(2, groups, width) * 0.02) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        return complex_mlp(z, self.weight1, self.bias1, self.weight2, self.bias2)


def complex_mlp(z: Tensor, *layers: Tensor) -> Tensor:
    """`ComplexMlp` of given weights (2, groups, in, out) and biases (2, groups, out), one after the other."""
    weight1, bias1, weight2, bias2 = layers
    return complex_linear(complex_linear(z, weight1, bias1).relu_(), weight2, bias2)


def complex_linear(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(a + b i)(u + v i) as one real product: (a, b) times ((u, v), (-v, u))."""
    u, v = weight
    whole = torch.cat([torch.cat([u, v], 2), torch.cat([-v, u], 2)], 1)
    return torch.baddbmm(bias.movedim(0, 1).flatten(1)[:, None], z, whole)


class Scattering(nn.Module):
    """out = T^-1(w * low, mlp(high)), low, high = T(x), T a dual-tree complex wavelet transform, on (B, H, W, C).

    The MLP works in `groups` of channels. w (2 ceil(H / 2), 2 ceil(W / 2), C) belongs to the native grid. Raises
    SaccadeError where the groups do not divide the width, or the grid has not two axes.
    (Patro, Agneeswaran, 2023, section 2.2.)
    """

    ranks = (2,)
    template = Template("wavelets: T^-1 diag(w, mlp) T", "none", "sum of x")
    undecayed: tuple[str, ...] = ("low",)

    def __init__(self, site: Site, groups: int = 4) -> None:
        super().__init__()
        if site.rank != 2:
            raise SaccadeError(f"grid {site.grid}: this wavelet transform is of images; give two sides")
        if site.dim % groups:
            raise SaccadeError(f"{groups} groups do not divide {site.dim} channels; choose a divisor")
        self.groups = groups
        self.low = nn.Parameter(torch.randn(*(side + side % 2 for side in site.grid), site.dim) * 0.02)
        self.channels = ComplexMlp(groups, site.dim // groups)

    def forward(self, x: Tensor) -> Tensor:
        low, high = dtcwt(x)
        high = self.mix(high)
        weight = resample(self.low[None], tuple(low.shape[1:-1]))
        return inverse_dtcwt(low * weight, high, tuple(x.shape[1:-1])).contiguous()

    def mix(self, high: Tensor) -> Tensor:
        """Channels of each coefficient: (B, h, w, 6, 2, C) -> same."""
        z = high.unflatten(-1, (self.groups, -1)).movedim(-2, 0)
        mixed = self.channels(z.flatten(-2).flatten(1, -2)).view(z.shape)
        return mixed.movedim(0, -2).flatten(-2)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The weights of another grid, for this one."""
        return resample(value[None], tuple(self.low.shape[:-1]))[0]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token and channel: 96 for each transform, 12 C / groups for the MLP."""
        return prod(side + side % 2 for side in grid) * site.dim * (192 + 12 * site.dim // self.groups)

    def reach(self, site: Site) -> tuple[int, ...]:
        """Filters there and back reach 9 + 6 tokens, and quads share their parts."""
        return (16, 16)


class RowMlp(ComplexMlp):
    """A `ComplexMlp` across each row of coefficients of a native grid (h, w), on (B, h, w, 6, 2, C)."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(*grid)
        self.grid = grid

    def forward(self, high: Tensor) -> Tensor:
        z = high.permute(1, 0, 3, 5, 4, 2)
        layers = (self.at(grown, tuple(high.shape[1:3]))
                  for grown in (self.weight1, self.bias1, self.weight2, self.bias2))
        mixed = complex_mlp(z.flatten(-2).flatten(1, -2), *layers).view(z.shape)
        return mixed.permute(1, 0, 5, 2, 4, 3)

    def at(self, value: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Weights or biases of another grid, for this one; what a row sums to stays."""
        if is_native(grid, tuple(value.shape[1:3])):
            return value
        if value.ndim == 3:
            return F.interpolate(value[None], size=grid, mode="bilinear")[0]
        return F.interpolate(value[None], size=(*grid, grid[1]), mode="trilinear")[0] * (value.shape[2] / grid[1])

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The weights of another grid, for this one."""
        return self.at(value, self.grid)


class _WithRows(Scattering):
    """`Scattering` that mixes the rows of coefficients after their channels."""

    def __init__(self, site: Site, groups: int) -> None:
        super().__init__(site, groups)
        self.rows = RowMlp((self.low.shape[0] // 2, self.low.shape[1] // 2))

    def mix(self, high: Tensor) -> Tensor:
        return self.rows(super().mix(high))


class RowScattering(nn.Module):
    """conv_3x3(a) and scattering(b), channel by channel in turn, a and b the halves of x; b mixes its rows as well.

    (B, H, W, C) -> (B, H, W, C). (Patro, Agneeswaran, 2023, section 2.2; the authors' second form.)
    """

    ranks = (2,)
    template = Template(
        "wavelets: T^-1 diag(w, mlp) T; w[i, j] of the row", "none", "sum of x, and a convolution of the other half"
    )

    def __init__(self, site: Site, groups: int = 4) -> None:
        super().__init__()
        half = replace(site, dim=site.dim // 2)
        self.scatter = _WithRows(half, groups)
        self.local = depthwise(2, half.dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.stack([self.local(a), self.scatter(b)], -1).flatten(-2)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token: scattering of C / 2 channels, each with 9 for the convolution and 6 W for rows."""
        tokens = prod(side + side % 2 for side in grid)
        half = replace(site, dim=site.dim // 2)
        return self.scatter.cost(half, grid) + half.dim * (9 * prod(grid) + 12 * tokens * ((grid[1] + 1) // 2))

    def reach(self, site: Site) -> tuple[int, ...]:
        """As scattering, and the whole row."""
        return (16, max(16, site.grid[1] - 1))


def _hierarchical(dims: Sequence[int], depths: Sequence[int], hidden: int, **options: Any) -> dict[str, Any]:
    return dict(dims=dims, depths=depths, heads=[dim // 32 for dim in dims], hidden=hidden) | options


SIZES: dict[str, dict[str, Any]] = {
    "svt_s": _hierarchical((64, 128, 320, 448), (3, 4, 6, 3), 32),
    "svt_b": _hierarchical((64, 128, 320, 512), (3, 4, 12, 3), 64),
    "svt_l": _hierarchical((96, 192, 384, 512), (3, 6, 18, 3), 64),
    "svt_nano": _hierarchical((32, 64, 128), (1, 2, 2), 16, ratios=(4, 4, 2), patch=2, img_size=32),
}


def svt(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float] = (8, 8, 4, 4),
    hidden: int = 32,
    scattering: int = 1,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> LabelledPyramid:
    """An SVT of a size: the first `scattering` stages scatter, the others attend; the stem is `hidden` wide."""
    mixers = [Scattering if stage < scattering else Attention for stage in range(len(dims))]
    return LabelledPyramid(dims, depths, heads, mixer=mixers, ratios=ratios, hidden=hidden, patch=patch, replace=mixer,
                           **common)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.movedim(0, -1)


SCATTERING: KeyMap = (
    Dropped(r"[xi]fm\.[hg]\d[oab]", "filters of the transform"),
    ("complex_weight_ll", "low", _channels_last),
    *((rf"complex_weight_lh_{theirs}{number}{end}", f"{mlp}.{ours}{number}") for number in (1, 2)
      for ours, theirs in (("weight", ""), ("bias", "b")) for mlp, end in (("channels", ""), ("rows", "_t"))),
)
ROW_SCATTERING: KeyMap = (*within(SCATTERING, "", "scatter."), (r"conv\.(.*)", r"local.\1"))
AUTHORS: KeyMap = tuple(wavevit_names((*SCATTERING, (r"q\.(.*)", r"qkv.\1#0"), (r"kv\.(.*)", r"qkv.\1#1"))))
# Stage outputs are normed, the last is the sequence after the class block; `block1_0` is the mixer's own output.
TAPS = (
    {"norm4": "norm"}
    | {rf"block{stage + 1}_(\d+)": rf"stages.{stage}.blocks.\1.mixer" for stage in range(4)}
    | {f"norm{stage + 1}": f"stages.{stage}" for stage in range(3)}
)
