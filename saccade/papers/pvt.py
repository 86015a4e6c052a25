"""PVT: a Transformer in a pyramid, made affordable by fewer keys.

Dense prediction wants fine maps, and attention over N tokens of a fine map costs N^2. Spatial-reduction attention keeps
all queries and merges R x R tokens to one key and value,
    out = proj(softmax(q k^T / sqrt(d)) v),   q = W_q x,   k, v = W_kv norm(merge_R(x)),
with R = 8, 4, 2, 1 from the finest stage to the coarsest. Stages begin with patches and a learned position; a class
token joins in the last.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", 2021, section
3.

Any grid: tokens beyond a multiple of R have queries and no key; positions are resampled (bilinear). Quirk kept: the
norm of the keys has eps 1e-5, the others 1e-6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, pvt_names, within, without_first_axis
from saccade.core.site import Site
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Mlp
from saccade.parts.position import Position, resample
from saccade.parts.reduction import SpatialReduction
from saccade.parts.stem import PatchEmbed
from saccade.parts.token_pyramid import TokenPyramid, TokenStage
from saccade.parts.tokens import join

_PUBLISHED = ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")

CARD = Card(
    "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
    authors="Wang, Xie, Li, Fan, Song, Liang, Lu, Luo, Shao",
    year=2021,
    systems=("pvt",),
    arxiv="2102.12122",
    code="whai362/PVT@57e2dfa",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper",
    keywords="spatial-reduction attention, SRA, fewer keys, pyramid vision transformer, class token",
    kinds=("backbone", "mixer"),
    mixers={"spatial_reduction": "SpatialReduction"},
    params=dict(zip(_PUBLISHED, (13.2e6, 24.5e6, 44.2e6, 61.4e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (1.9e9, 3.8e9, 6.7e9, 9.8e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (75.1, 79.8, 81.2, 81.7), strict=True)),
    weights={name: Weights(f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth", licence="Apache-2.0")
             for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")},
    goldens=("pvt_tiny", "op_pvt_spatial_reduction_attention", "op_pvt_spatial_reduction_attention_odd"),
)

class PositionedTokenStage(TokenStage):
    """A last stage with a position (1, 1 + N, C) for its class token and its grid."""

    undecayed = ("class_token", "position")

    def __init__(self, stage: TokenStage, site: Site) -> None:
        super().__init__(stage, site.dim)
        self.grid = site.grid
        self.position = nn.Parameter(torch.zeros(1, 1 + prod(site.grid), site.dim))

    def enter(self, x: Tensor, prefix: Tensor) -> Tensor:
        return join(x, prefix) + self._at(self.position, self.grid, tuple(x.shape[1:-1]))

    def _at(self, table: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        moved = resample(table[:, 1:].unflatten(1, native), grid, linear=True)
        return torch.cat([table[:, :1], moved.flatten(1, -2)], 1)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The table of a square grid of another side, for this grid."""
        side = round((value.shape[1] - 1) ** (1 / len(self.grid))) if parameter == "position" else 0
        return self._at(value, (side,) * len(self.grid), self.grid) if side else value


_DIMS: dict[str, Any] = dict(dims=(64, 128, 320, 512))
SIZES: dict[str, dict[str, Any]] = {
    "pvt_tiny": _DIMS | dict(depths=(2, 2, 2, 2)),
    "pvt_small": _DIMS | dict(depths=(3, 4, 6, 3)),
    "pvt_medium": _DIMS | dict(depths=(3, 4, 18, 3)),
    "pvt_large": _DIMS | dict(depths=(3, 8, 27, 3)),
    "pvt_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), reductions=(4, 2, 1), patch=2, img_size=32),
}


def pvt(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int] = (1, 2, 5, 8),
    ratios: Sequence[float] = (8, 8, 4, 4),
    reductions: Sequence[int] = (8, 4, 2, 1),
    patch: int = 4,
    qkv_bias: bool = True,
    mixer: Any = None,
    **common: Any,
) -> TokenPyramid:
    """A PVT of the first version: patches, learned positions, a class token in the last stage."""

    def block(site: Site, mixer: nn.Module, drop_path: float, kind: type[Block] = Block) -> Block:
        return kind(site, mixer, drop_path=drop_path, mlp=partial(Mlp, ratio=ratios[site.stage]))

    model = TokenPyramid(
        dims, depths, heads, stem=partial(PatchEmbed, kernel=patch, stride=patch, norm=nn.LayerNorm), stride=patch,
        downsample=partial(ConvMerging, kernel=2), block=block,
        mixer=[partial(SpatialReduction, reduction=reduction, qkv_bias=qkv_bias) for reduction in reductions],
        norm=LAYER_NORM, replace=mixer, **common,
    )
    stages: Any = model.stages
    sites = [stage.blocks[0].site for stage in stages]
    first = Position(sites[0].dim, sites[0].grid, linear=True)
    model.stem = nn.Sequential(OrderedDict(patch=model.stem, position=first))
    for stage, site in zip(stages[1:-1], sites[1:-1], strict=True):
        stage.downsample.add_module("position", Position(site.dim, site.grid, linear=True))
    stages[-1] = PositionedTokenStage(stages[-1], sites[-1])
    return model


MIXER: KeyMap = (
    (r"sr\.(.*)", r"merge.0.\1"),
    (r"norm\.(.*)", r"merge.1.\1"),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed1\.(.*)", r"stem.patch.\1"),
    ("pos_embed1", "stem.position.table"),
    *((f"pos_embed{stage + 1}", f"stages.{stage}.downsample.position.table") for stage in (1, 2)),
    ("pos_embed4", "stages.3.position"),
    ("cls_token", "stages.3.class_token", without_first_axis),
    (r"(head\..*)", r"\1"),
    *pvt_names(within(MIXER, r"attn\.", "mixer.")),
)


def TAPS(name: str) -> dict[str, str]:
    """The authors' stage outputs are those of its last block: tokens, in the last stage with the class token."""
    return {f"stage{stage + 1}": f"stages.{stage}.blocks.{depth - 1}"
            for stage, depth in enumerate(SIZES[name]["depths"])}
