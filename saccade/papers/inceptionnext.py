"""InceptionNeXt: a large depthwise kernel taken apart into a small square and two bands.

ConvNeXt's 7x7 depthwise convolution is cheap in arithmetic and slow in memory. Most channels do not need it: of C
channels, g = ratio C go through a 3x3, g through a 1 x k band, g through a k x 1 band, and the rest stays as it is,
    out = concat(x_identity, conv_3x3(x_square), conv_1xk(x_wide), conv_kx1(x_tall)).
The blocks are ConvNeXt's with batch norm; the head is an MLP.

Yu, Zhou, Yan, Wang, "InceptionNeXt: When Inception Meets ConvNeXt", 2024, section 3.

Any grid: convolutions pad with zeros; between stages a last odd row or column is left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import LAYER_NORM, SingleBlock
from saccade.parts.convolution import GRID_CONVOLUTIONS
from saccade.parts.head import Head
from saccade.parts.merging import NormedMerging
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_ADDRESS = "https://github.com/sail-sg/inceptionnext/releases/download/model/"

CARD = Card(
    "InceptionNeXt: When Inception Meets ConvNeXt",
    authors="Yu, Zhou, Yan, Wang",
    year=2024,
    systems=("inceptionnext",),
    arxiv="2303.16900",
    code="sail-sg/inceptionnext@3f9769c",
    licence="Apache-2.0",
    read="paper",
    keywords="inception depthwise convolution, band kernels, large kernel decomposition, partial convolution, MetaNeXt",
    kinds=("backbone", "mixer"),
    mixers={"inception_depthwise": "InceptionDepthwise"},
    params={"inceptionnext_atto": 4.2e6, "inceptionnext_tiny": 28e6, "inceptionnext_small": 49e6,
            "inceptionnext_base": 87e6, "inceptionnext_base_384": 87e6},
    macs={"inceptionnext_atto": 0.5e9, "inceptionnext_tiny": 4.2e9, "inceptionnext_small": 8.4e9,
          "inceptionnext_base": 14.9e9, "inceptionnext_base_384": 43.6e9},
    top1={"inceptionnext_atto": 75.3, "inceptionnext_tiny": 82.3, "inceptionnext_small": 83.5,
          "inceptionnext_base": 84.0, "inceptionnext_base_384": 85.2},
    aliases={f"inception_next_{size}": f"inceptionnext_{size}" for size in ("atto", "tiny", "small", "base")},
    weights={name: Weights(f"{_ADDRESS}{name}.pth", crop=crop, licence="Apache-2.0")
             for name, crop in (("inceptionnext_tiny", 0.875), ("inceptionnext_small", 0.875),
                                ("inceptionnext_base", 0.95), ("inceptionnext_base_384", 1.0))}
    | {"inceptionnext_atto": Weights("timm:inception_next_atto.sail_in1k", licence="Apache-2.0")},
    goldens=("inceptionnext_atto", "inceptionnext_tiny", "op_inception_dwconv"),
)


class InceptionDepthwise(nn.Module):
    """Depthwise convolutions on parts of the channels: identity | 3x3 | a band of `band` tokens along each axis.

    (B, *grid, C) -> (B, *grid, C); the 3x3 and each band take int(ratio C) channels, the identity keeps the rest.
    (Yu et al., 2024, equations 2-4.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i] of a square and two bands", "none", "sum of x, channels in four parts")

    def __init__(self, site: Site, band: int = 11, ratio: float = 0.125, square: int = 3) -> None:
        super().__init__()
        self.band, self.square, self.part = band, square, max(int(site.dim * ratio), 1)
        kernels = [(square,) * site.rank]
        kernels += [tuple(band if axis == along else 1 for axis in range(site.rank))
                    for along in reversed(range(site.rank))]
        self.convs = nn.ModuleList(
            GRID_CONVOLUTIONS[site.rank](self.part, self.part, kernel, padding=tuple(side // 2 for side in kernel),
                                         groups=self.part)
            for kernel in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        rest = x.shape[-1] - len(self.convs) * self.part
        identity, *parts = x.split((rest, *[self.part] * len(self.convs)), -1)
        return torch.cat([identity, *(conv(part) for conv, part in zip(self.convs, parts, strict=True))], -1)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N g (square^rank + rank band)."""
        return torch.Size(grid).numel() * self.part * (self.square**site.rank + site.rank * self.band)

    def reach(self, site: Site) -> tuple[int, ...]:
        return (max(self.square, self.band) // 2,) * site.rank


class MlpHead(Head):
    """fc2(norm(gelu(fc1(pool(x))))), three times as wide inside."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool)
        if num_classes:
            self.fc = nn.Sequential(nn.Linear(dim, 3 * dim), Gelu(), LAYER_NORM(3 * dim),
                                    nn.Linear(3 * dim, num_classes))


_BASE: dict[str, Any] = dict(dims=(128, 256, 512, 1024), depths=(3, 3, 27, 3))
SIZES: dict[str, dict[str, Any]] = {
    "inceptionnext_atto": dict(dims=(40, 80, 160, 320), depths=(2, 2, 6, 2), band=9, ratio=0.25),
    "inceptionnext_tiny": dict(dims=(96, 192, 384, 768), depths=(3, 3, 9, 3)),
    "inceptionnext_small": dict(dims=(96, 192, 384, 768), depths=(3, 3, 27, 3)),
    "inceptionnext_base": _BASE,
    "inceptionnext_base_384": _BASE | dict(img_size=384),
    "inceptionnext_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), band=5, patch=2, img_size=32),
}


def inceptionnext(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    band: int = 11,
    ratio: float = 0.125,
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 3),
    patch: int = 4,
    layer_scale: float | None = 1e-6,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """An InceptionNeXt of a size; heads of 32 channels for the mixers that want some."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> SingleBlock:
        mlp = partial(Mlp, ratio=mlp_ratios[site.stage])
        return SingleBlock(site, mixer, drop_path=drop_path, norm=BatchNorm, mlp=mlp, layer_scale=layer_scale)

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=patch, stride=patch, norm=BatchNorm), stride=patch,
        downsample=partial(NormedMerging, norm=BatchNorm), block=block,
        mixer=partial(InceptionDepthwise, band=band, ratio=ratio), head=MlpHead, replace=mixer, **common,
    )


_CONVS = tuple(enumerate(("hw", "w", "h")))
MIXER: KeyMap = tuple((rf"dwconv_{theirs}\.(.*)", rf"convs.{ours}.\1") for ours, theirs in _CONVS)
_BLOCK = r"(stages\.\d+\.blocks\.\d+)"
AUTHORS: KeyMap = (
    (r"stem\.0\.(.*)", r"stem.proj.\1"),
    (r"stem\.1\.(.*)", r"stem.norm.\1"),
    *((rf"{_BLOCK}\.token_mixer\.dwconv_{theirs}\.(.*)", rf"\1.mixer.convs.{ours}.\2") for ours, theirs in _CONVS),
    (rf"{_BLOCK}\.gamma", r"\1.scale.0.gamma"),
    (rf"{_BLOCK}(\.mlp\.fc\d\.weight)", r"\1\2", matrix_from_1x1),
    (r"head\.fc1\.(.*)", r"head.fc.0.\1"),
    (r"head\.norm\.(.*)", r"head.fc.2.\1"),
    (r"head\.fc2\.(.*)", r"head.fc.3.\1"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
