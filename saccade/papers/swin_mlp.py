"""Swin-MLP: Swin's windows, mixed by a matrix instead of attention.

Inside each window of M x M tokens every head has one matrix over positions and one bias, for all its channels alike,
    out[i] = sum_j W_h[i, j] x[j] + b_h[i],
and every second block shifts the windows by M/2. What hangs over the border is zero: windows at the edges are not
joined with those of the far side, as Swin's are, so no mask is needed.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021 (the MLP architectures of
section 5.3 and of the authors' code).

Any grid: one that is no multiple of the window is zero-padded at its end. Where a side of the native grid is no longer
than the window, the window takes that side and does not shift.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.window import pad_ends
from saccade.parts.attention import check_heads
from saccade.parts.swin_pyramid import SwinPyramid

_ADDRESS = "https://github.com/SwinTransformer/storage/releases/download/v1.0.5/"
_LAYOUTS = {
    "swin_mlp_tiny_c24": "swin_mlp_tiny_c24_patch4_window8_256",
    "swin_mlp_tiny_c12": "swin_mlp_tiny_c12_patch4_window8_256",
    "swin_mlp_tiny_c6": "swin_mlp_tiny_c6_patch4_window8_256",
    "swin_mlp_base": "swin_mlp_base_patch4_window7_224",
}

CARD = Card(
    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Swin-MLP)",
    authors="Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo",
    year=2021,
    arxiv="2103.14030",
    code="microsoft/Swin-Transformer@f82860b",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="shifted window, multi-head spatial MLP, grouped linear layer, attention-free",
    kinds=("backbone", "mixer"),
    mixers={"shifted_window_mlp": "ShiftedWindowMlp"},
    params=dict(zip(_LAYOUTS, (20e6, 21e6, 23e6, 61e6), strict=True)),
    macs=dict(zip(_LAYOUTS, (4.0e9, 4.0e9, 4.0e9, 10.4e9), strict=True)),
    top1=dict(zip(_LAYOUTS, (79.4, 79.6, 79.7, 81.3), strict=True)),
    aliases={layout: name for name, layout in _LAYOUTS.items()},
    weights={name: Weights(f"{_ADDRESS}{layout}.pth", licence="MIT") for name, layout in _LAYOUTS.items()},
    tests=("tests/papers/test_swin_mlp.py",),
)


class ShiftedWindowMlp(nn.Module):
    """out = W_h x + b_h over the positions of each window and head: (B, *grid, C) -> (B, *grid, C).

    `window` is a side in tokens; in blocks of odd index the windows are shifted by half of it.
    """

    ranks = (1, 2, 3)
    template = Template("w[i, j] of the place in the window", "none", "sum of x")

    def __init__(self, site: Site, window: int = 7, shift: int | None = None) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.side = min(window, *site.grid)
        half = self.side // 2 if site.index % 2 and min(site.grid) > window else 0
        self.shift = half if shift is None else shift
        tokens = self.side**site.rank
        self.weight = nn.Parameter(torch.empty(site.heads, tokens, tokens))
        self.bias = nn.Parameter(torch.zeros(site.heads * tokens))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        ends = self.overhang(grid)
        x = pad_ends(x, ends)
        out = self.mix(x)
        return pad_ends(out, [(-first, -last) for first, last in ends])

    def mix(self, x: Tensor) -> Tensor:
        """The windows of a grid that is a multiple of them: one matrix product a head, one copy there, one back."""
        rank, counts = x.ndim - 2, [side // self.side for side in x.shape[1:-1]]
        sides = [size for count in counts for size in (count, self.side)]
        inside, windows = list(range(2, 2 * rank + 1, 2)), list(range(1, 2 * rank, 2))
        order = [2 * rank + 1, *inside, 0, *windows, 2 * rank + 2]  # heads, place in the window, image, window, channel
        cells = x.view(x.shape[0], *sides, self.heads, -1).permute(order).clone(memory_format=torch.contiguous_format)
        mixed = torch.baddbmm(self.bias.view(self.heads, -1, 1), self.weight, cells.flatten(rank + 1).flatten(1, rank))
        back = sorted(range(len(order)), key=order.__getitem__)
        return mixed.view(cells.shape).permute(back).clone(memory_format=torch.contiguous_format).view(x.shape)

    def overhang(self, grid: tuple[int, ...]) -> list[tuple[int, int]]:
        """Zeros before and after each axis."""
        first = self.side - self.shift if self.shift else 0
        return [(first, self.shift + (-side) % self.side) for side in grid]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: side^rank C for each of the padded grid's tokens."""
        padded = prod(sum(pair) + side for pair, side in zip(self.overhang(grid), grid, strict=True))
        return padded * self.side**site.rank * site.dim

    def reach(self, site: Site) -> tuple[int, ...]:
        """From one end of a window to the other."""
        return (self.side - 1,) * site.rank


_TINY: dict[str, Any] = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), window=8, img_size=256)
SIZES: dict[str, dict[str, Any]] = {
    "swin_mlp_tiny_c24": _TINY | dict(heads=(4, 8, 16, 32)),
    "swin_mlp_tiny_c12": _TINY | dict(heads=(8, 16, 32, 64)),
    "swin_mlp_tiny_c6": _TINY | dict(heads=(16, 32, 64, 128)),
    "swin_mlp_base": dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "swin_mlp_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), window=4, patch=2, img_size=32),
}


def swin_mlp(
    dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], window: int = 7, patch: int = 4,
    mixer: Any = None, **common: Any,
) -> SwinPyramid:
    """A Swin-MLP of a size."""
    windows = partial(ShiftedWindowMlp, window=window)
    return SwinPyramid(dims, depths, heads, patch, mixer=windows, replace=mixer, **common)


def _matrices(weight: Tensor) -> Tensor:
    """(heads N, N, 1) of a grouped convolution -> (heads, N, N)."""
    return weight.squeeze(-1).unflatten(0, (-1, weight.shape[1]))


_BLOCK, _OURS = r"layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."
AUTHORS: KeyMap = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    (_BLOCK + r"spatial_mlp\.weight", _OURS + "mixer.weight", _matrices),
    (_BLOCK + r"spatial_mlp\.bias", _OURS + "mixer.bias"),
    *((rf"layers\.{stage}\.downsample\.(.*)", rf"stages.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"layers\.(\d+)\.(.*)", r"stages.\1.\2"),
    (r"head\.(.*)", r"head.fc.\1"),
)
# The authors' stage outputs are taken after the merging that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
