"""PVT v2: PVT with overlapping patches, a convolution instead of positions, and attention of linear cost.

What changes since PVT: patches overlap (7x7 and 3x3 convolutions with stride), the MLP has a depthwise 3x3 convolution,
which tells places apart, so that positions and the class token go, and a linear form of spatial-reduction attention
pools keys and values to 7 x 7 whatever the grid,
    k, v = W_kv gelu(norm(W pool_7(x))).

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", 2022, section 3.

Any grid: see PVT for its attention. Quirks kept: the norm of the keys has eps 1e-5, those of blocks and stages 1e-6;
the linear form has a ReLU after the first layer of its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, pointwise, pvt_names, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.pooling import adaptive_mean
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import ConvMlp, Gelu
from saccade.parts.pyramid import Pyramid
from saccade.parts.reduction import SpatialReduction
from saccade.parts.stem import PatchEmbed

_PUBLISHED = (*(f"pvt_v2_b{number}" for number in range(6)), "pvt_v2_b2_li")

CARD = Card(
    "PVT v2: Improved Baselines with Pyramid Vision Transformer",
    authors="Wang, Xie, Li, Fan, Song, Liang, Lu, Luo, Shao",
    year=2022,
    arxiv="2106.13797",
    code="whai362/PVT@57e2dfa",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper",
    keywords="linear spatial-reduction attention, overlapping patch embedding, convolutional feed-forward, PVT v2",
    kinds=("backbone", "mixer"),
    mixers={"pooled_reduction": "PooledReduction"},
    params=dict(zip(_PUBLISHED, (3.7e6, 14.0e6, 25.4e6, 45.2e6, 62.6e6, 82.0e6, 22.6e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (0.6e9, 2.1e9, 4.0e9, 6.9e9, 10.1e9, 11.8e9, 3.9e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (70.5, 78.7, 82.0, 83.1, 83.6, 83.8, 82.1), strict=True)),
    weights={name: Weights(f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth", licence="Apache-2.0")
             for name in ("pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5",
                          "pvt_v2_b2_li")},
    goldens=("pvt_v2_b0", "op_pvt_v2_linear_attention"),
)


class PooledReduction(SpatialReduction):
    """Attention to keys and values of a map pooled to `cells_a_side` tokens a side: cost linear in N.

    (B, *grid, C) -> (B, *grid, C). (Wang et al., PVT v2, 2022, section 3.1.)
    """

    template = Template("q k^T / sqrt(d) to a pooled map", "softmax", "sum of v, pooled")

    def __init__(self, site: Site, cells_a_side: int = 7, qkv_bias: bool = True) -> None:
        self.cells_a_side = cells_a_side
        super().__init__(site, 1, qkv_bias)

    def merging(self, site: Site) -> nn.Module:
        return nn.Sequential(nn.Linear(site.dim, site.dim), nn.LayerNorm(site.dim), Gelu())

    def merged(self, x: Tensor) -> Tensor:
        return self.merge(adaptive_mean(x, (self.cells_a_side,) * (x.ndim - 2)))

    def where(self, x: Tensor, merged: Tensor, prefix: int) -> None:
        """Cells overlap: a key stands for no single token."""

    def cells(self, grid: tuple[int, ...]) -> int:
        return self.cells_a_side ** len(grid)


class ReluConvMlp(ConvMlp):
    """fc2(gelu(conv(relu(fc1(x))))): the MLP beside pooled reduction."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.local(self.fc1(x).relu())))


_DIMS: dict[str, Any] = dict(dims=(64, 128, 320, 512))
SIZES: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "pvt_v2_b1": _DIMS | dict(depths=(2, 2, 2, 2)),
    "pvt_v2_b2": _DIMS | dict(depths=(3, 4, 6, 3)),
    "pvt_v2_b3": _DIMS | dict(depths=(3, 4, 18, 3)),
    "pvt_v2_b4": _DIMS | dict(depths=(3, 8, 27, 3)),
    "pvt_v2_b5": _DIMS | dict(depths=(3, 6, 40, 3), ratios=(4, 4, 4, 4)),
    "pvt_v2_b2_li": _DIMS | dict(depths=(3, 4, 6, 3), linear=True),
    "pvt_v2_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), reductions=(4, 2, 1), patch=2,
                        img_size=32),
}


def pvt_v2(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int] = (1, 2, 5, 8),
    ratios: Sequence[float] = (8, 8, 4, 4),
    reductions: Sequence[int] = (8, 4, 2, 1),
    linear: bool = False,
    patch: int = 4,
    qkv_bias: bool = True,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A PVT v2 of a size; `linear` pools keys to 7 x 7 in every stage."""
    mlp = ReluConvMlp if linear else ConvMlp

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return Block(site, mixer, drop_path=drop_path, mlp=partial(mlp, site.rank, ratio=ratios[site.stage]))

    mixers = [partial(PooledReduction, qkv_bias=qkv_bias) if linear
              else partial(SpatialReduction, reduction=reduction, qkv_bias=qkv_bias) for reduction in reductions]
    return Pyramid(
        dims, depths, heads, stride=patch,
        stem=partial(PatchEmbed, kernel=2 * patch - 1, stride=patch, padding=patch - 1, norm=nn.LayerNorm),
        downsample=ConvMerging, block=block, mixer=mixers, stage_norm=LAYER_NORM, replace=mixer, **common,
    )


POOLED: KeyMap = (
    (r"sr\.weight", "merge.0.weight", matrix_from_1x1),
    (r"sr\.bias", "merge.0.bias"),
    (r"norm\.(.*)", r"merge.1.\1"),
    (r"(.*)", r"\1"),
)


_BLOCK: KeyMap = (
    (r"attn\.sr\.weight", "mixer.merge.0.weight", pointwise),
    *within(POOLED[1:], r"attn\.", "mixer."),
    (r"mlp\.dwconv\.(?:dwconv\.)?(.*)", r"mlp.local.\1"),
)
AUTHORS: KeyMap = pvt_names(_BLOCK)
TIMM: KeyMap = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    (r"(stages\.\d+\.downsample)\.proj\.(.*)", r"\1.0.\2"),
    (r"(stages\.\d+\.downsample)\.norm\.(.*)", r"\1.1.\2"),
    *within(_BLOCK, r"(stages\.\d+\.blocks\.\d+)\.", r"\1."),
    (r"head\.(.*)", r"head.fc.\1"),
)


def TAPS(name: str) -> dict[str, str]:
    """The authors' stage outputs are those of its last block, before the norm."""
    return {f"stage{stage + 1}": f"stages.{stage}.blocks.{depth - 1}"
            for stage, depth in enumerate(SIZES[name]["depths"])}
