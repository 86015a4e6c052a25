"""Swin: attention inside windows that shift every other block.

Tokens attend inside non-overlapping windows of M x M with a learned bias a relative offset,
    out = softmax(q k^T / sqrt(d) + B) v,
and every second block shifts the grid by M/2, so that windows straddle the borders of those before. After the roll,
tokens that were not neighbours meet in the last windows; a mask of -100 keeps their regions apart. Four stages, merged
2x2 between them, make a pyramid.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, sections 3.1-3.2.

Any grid: one that is no multiple of the window is zero-padded at its end, before qkv; padded tokens are attended to
within their region, as in the authors' dense-prediction code. Where a side of the native grid is no longer than the
window, the window takes that side; where a side of the grid is no longer than the window and nothing is padded, it does
not shift (the authors' classification code).
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from torch import Tensor

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import larger, smaller
from saccade.parts.swin_pyramid import SwinPyramid
from saccade.parts.window import WindowAttention

_ADDRESS = "https://github.com/SwinTransformer/storage/releases/download/"
_LAYOUTS = {"tiny": "tiny_patch4_window7_224", "small": "small_patch4_window7_224", "base": "base_patch4_window7_224",
            "large": "large_patch4_window7_224", "base_384": "base_patch4_window12_384",
            "large_384": "large_patch4_window12_384"}

CARD = Card(
    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    authors="Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo",
    year=2021,
    systems=("swin",),
    arxiv="2103.14030",
    code="microsoft/Swin-Transformer@f82860b",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="shifted window attention, relative position bias, hierarchical vision transformer, patch merging",
    kinds=("backbone", "mixer"),
    mixers={"shifted_window": "ShiftedWindow"},
    params={"swin_tiny": 28.3e6, "swin_small": 49.6e6, "swin_base": 87.8e6, "swin_large": 196.5e6,
            "swin_base_384": 88e6, "swin_large_384": 197e6, "swin_tiny_c24": 28e6},
    macs={"swin_tiny": 4.5e9, "swin_small": 8.7e9, "swin_base": 15.4e9, "swin_large": 34.5e9,
          "swin_base_384": 47.1e9, "swin_large_384": 103.9e9, "swin_tiny_c24": 5.9e9},
    # The large models were trained on ImageNet-22K first.
    top1={"swin_tiny": 81.2, "swin_small": 83.2, "swin_base": 83.5, "swin_large": 86.3, "swin_base_384": 84.5,
          "swin_large_384": 87.3, "swin_tiny_c24": 81.6},
    aliases={
        **{f"swin_{layout}{data}": f"swin_{size}{data}" for size, layout in _LAYOUTS.items() for data in ("", "_22k")},
        "swin_tiny_c24_patch4_window8_256": "swin_tiny_c24",
    },
    weights={
        **{f"swin_{size}": Weights(f"{_ADDRESS}v1.0.0/swin_{_LAYOUTS[size]}.pth", licence="MIT")
           for size in ("tiny", "small", "base", "base_384")},
        **{f"swin_{size}": Weights(f"{_ADDRESS}v1.0.0/swin_{_LAYOUTS[size]}_22kto1k.pth",
                                   data="ImageNet-22K, ImageNet-1K", licence="MIT")
           for size in ("large", "large_384")},
        **{f"swin_{size}_22k": Weights(f"{_ADDRESS}{'v1.0.8' if size in ('tiny', 'small') else 'v1.0.0'}/"
                                       f"swin_{layout}_22k.pth", data="ImageNet-22K", licence="MIT")
           for size, layout in _LAYOUTS.items()},
        "swin_tiny_c24": Weights(f"{_ADDRESS}v1.0.5/swin_tiny_c24_patch4_window8_256.pth", licence="MIT"),
    },
    goldens=("swin_tiny", "op_swin_block_shifted", "op_swin_patch_merging", "op_swin_window_attention"),
)


class ShiftedWindow(WindowAttention):
    """Window attention; in blocks of odd index the windows are shifted by half their side."""

    template = Template("q k^T / sqrt(d) + offset, in windows, shifted in turn", "softmax", "sum of v")

    def __init__(
        self, site: Site, window: int | tuple[int, ...] = 7, shift: int | None = None, qkv_bias: bool = True
    ) -> None:
        sides = (window,) * site.rank if isinstance(window, int) else tuple(window)
        if min(site.grid) <= min(sides):
            sides = (min(site.grid),) * site.rank
        super().__init__(site, sides, qkv_bias)
        self.shift = (min(self.window) // 2 if site.index % 2 else 0) if shift is None else shift

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        shift = shift_at(grid, self.window, self.shift)
        if isinstance(shift, int) and shift == 0:
            return super().forward(x)
        return self.attend_shifted(x, shift)


def shift_at(grid: tuple[int, ...], window: tuple[int, ...], shift: int) -> int:
    """The shift on this grid: none where the shorter side is no longer than the window and nothing is padded.

    Written with min and max, not if, so that an exported program with free sizes keeps the choice.
    """
    longer = larger(0, reduce(smaller, grid) - min(window))
    padding = sum((-side) % part for side, part in zip(grid, window, strict=True))
    return shift * smaller(1, longer + padding) if shift else 0


SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_small": dict(dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "swin_base": dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "swin_large": dict(dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
}
SIZES |= {
    "swin_base_384": SIZES["swin_base"] | dict(window=12, img_size=384),
    "swin_large_384": SIZES["swin_large"] | dict(window=12, img_size=384),
    "swin_tiny_c24": SIZES["swin_tiny"] | dict(heads=(4, 8, 16, 32), window=8, img_size=256),
    "swin_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), window=4, patch=2, img_size=32),
}
SIZES |= {f"swin_{size}_22k": SIZES[f"swin_{size}"] | dict(num_classes=21841) for size in _LAYOUTS}


def swin(
    dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], window: int = 7, patch: int = 4,
    mixer: Any = None, **common: Any,
) -> SwinPyramid:
    """A Swin Transformer of a size."""
    return SwinPyramid(dims, depths, heads, patch, mixer=partial(ShiftedWindow, window=window), replace=mixer, **common)


_NAMES = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", r"stages.\1.blocks.\2.mixer.bias.table"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.(.*)", r"stages.\1.blocks.\2.mixer.\3"),
    (r"layers\.(\d+)\.(.*)", r"stages.\1.\2"),
)
AUTHORS: KeyMap = (
    Dropped(r".*(relative_position_index|attn_mask)", "derived buffer"),
    *((rf"layers\.{stage}\.downsample\.(.*)", rf"stages.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"head\.(.*)", r"head.fc.\1"),
    *_NAMES,
)
TIMM: KeyMap = (Dropped(r".*(relative_position_index|attn_mask)", "derived buffer"), *_NAMES)
# The authors' stage outputs are taken after the merging that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
