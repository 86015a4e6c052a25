"""MetaFormer and PoolFormer: the block matters more than the mixer.

A Transformer block with its token mixer left open,
    x += gamma1 mix(norm(x));   x += gamma2 mlp(norm(x)),
works even when mixing is average pooling without a single parameter, mix(x) = pool3x3(x) - x (PoolFormer), or nothing
at all (the `id` model). Mixed stages show what attention adds at the end: the letters of `metaformer_ppaa_s12` are the
mixers of the four stages, p pooling, a attention, f a linear layer over positions.

Yu et al., "MetaFormer Is Actually What You Need for Vision", 2022, section 3.

Pooling averages over the neighbours inside the map (padding is not counted). Models with attention add a learned
position before their first stage with it, resampled (bicubic) off the native grid; the linear layer over positions is
resampled on both its axes, rows kept in sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.core.site import MixerFactory
from saccade.parts.attention import Attention
from saccade.parts.block import Block, Norm
from saccade.parts.convolution import grid_conv
from saccade.parts.norm import GroupNorm1
from saccade.parts.position import Position
from saccade.parts.pyramid import Pyramid
from saccade.parts.spatial import Identity, Pooling, SpatialFc
from saccade.parts.stem import PatchEmbed

_ADDRESS = "https://github.com/sail-sg/poolformer/releases/download/v1.0/"
_PUBLISHED = ("poolformer_s12", "poolformer_s24", "poolformer_s36", "poolformer_m36", "poolformer_m48")
_ABLATED = ("metaformer_id_s12", "metaformer_pppa_s12", "metaformer_ppaa_s12", "metaformer_pppf_s12",
            "metaformer_ppff_s12")

CARD = Card(
    "MetaFormer Is Actually What You Need for Vision",
    authors="Yu, Luo, Zhou, Si, Zhou, Wang, Feng, Yan",
    year=2022,
    systems=("metaformer",),
    arxiv="2111.11418",
    code="sail-sg/poolformer@a075575",
    licence="Apache-2.0",
    read="paper, code",
    keywords="PoolFormer, average pooling as token mixer, identity mixer, spatial fully connected",
    kinds=("backbone", "mixer"),
    mixers={"pooling": "Pooling", "spatial_fc": "SpatialFc", "identity": "Identity"},
    params=dict(zip((*_PUBLISHED, *_ABLATED),
                    (11.9e6, 21.4e6, 30.8e6, 56.2e6, 73.5e6, 11.9e6, 14.0e6, 16.5e6, 11.9e6, 12.2e6), strict=True)),
    macs=dict(zip((*_PUBLISHED, *_ABLATED),
                  (1.8e9, 3.4e9, 5.0e9, 8.8e9, 11.6e9, 1.8e9, 1.9e9, 2.5e9, 1.8e9, 1.9e9), strict=True)),
    top1=dict(zip((*_PUBLISHED, *_ABLATED), (77.2, 80.3, 81.4, 82.1, 82.5, 74.3, 78.3, 81.0, 77.5, 77.9), strict=True)),
    aliases={f"metaformer_{letters}_s12_224": f"metaformer_{letters}_s12"
             for letters in ("pppa", "ppaa", "pppf", "ppff")},
    weights={name: Weights(f"{_ADDRESS}{name}.pth.tar", crop=0.95 if "_m" in name else 0.9) for name in _PUBLISHED},
    goldens=("poolformer_s12", "metaformer_ppaa_s12", "op_poolformer_block", "op_pooling_mixer"),
)

class Downsample(nn.Sequential):
    """A 3x3 convolution of stride 2 (and, in some models, a learned position after it)."""

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__(grid_conv(rank, dim, out_dim, 3, stride=2, padding=1))


MIXERS: dict[str, MixerFactory] = {
    "p": Pooling, "a": partial(Attention, qkv_bias=False), "f": SpatialFc, "i": Identity,
}

_S12: dict[str, Any] = dict(dims=(64, 128, 320, 512), depths=(2, 2, 6, 2))
_M36: dict[str, Any] = dict(dims=(96, 192, 384, 768), depths=(6, 6, 18, 6), layer_scale=1e-6)
SIZES: dict[str, dict[str, Any]] = {
    "poolformer_s12": _S12,
    "poolformer_s24": _S12 | dict(depths=(4, 4, 12, 4)),
    "poolformer_s36": _S12 | dict(depths=(6, 6, 18, 6), layer_scale=1e-6),
    "poolformer_m36": _M36,
    "poolformer_m48": _M36 | dict(depths=(8, 8, 24, 8)),
    "metaformer_id_s12": _S12 | dict(letters="iiii"),
    "metaformer_pppa_s12": _S12 | dict(letters="pppa", norm="layer"),
    "metaformer_ppaa_s12": _S12 | dict(letters="ppaa", norm="layer"),
    "metaformer_pppf_s12": _S12 | dict(letters="pppf"),
    "metaformer_ppff_s12": _S12 | dict(letters="ppff"),
    "poolformer_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), letters="ppp", patch=2, img_size=32),
}
NORMS: dict[str, Norm] = {"group": GroupNorm1, "layer": partial(nn.LayerNorm, eps=1e-5)}


def metaformer(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    letters: str = "pppp",
    norm: str = "group",
    layer_scale: float = 1e-5,
    pool: int = 3,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A MetaFormer whose stages mix as `letters` say (p, a, f, i); heads of 32 channels where there is attention."""
    if norm not in NORMS or set(letters) - set(MIXERS):
        known = f"letters are of {''.join(MIXERS)}, norm of {list(NORMS)}"
        raise SaccadeError(f"letters={letters!r}, norm={norm!r}: {known}")
    mixers = [partial(Pooling, kernel=pool) if letter == "p" else MIXERS[letter] for letter in letters]
    model = Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=2 * patch - 1, stride=patch, padding=patch // 2), stride=patch,
        downsample=Downsample, block=partial(Block, norm=NORMS[norm], layer_scale=layer_scale),
        mixer=mixers, norm=NORMS[norm], replace=mixer, **common,
    )
    if "a" in letters:
        first: Any = model.stages[letters.index("a")]
        site = first.blocks[0].site
        first.downsample.add_module("position", Position(site.dim, site.grid))
    return model


def _table(value: Tensor) -> Tensor:
    """(1, C, *grid) as (1, N, C)."""
    return value.flatten(2).mT


_BLOCK: Any = (
    (r"network\.{source}\.(\d+)\.layer_scale_(\d)", r"stages.{stage}.blocks.\1.scale\2.0.gamma"),
    (r"network\.{source}\.(\d+)\.mlp\.(fc\d)\.weight", r"stages.{stage}.blocks.\1.mlp.\2.weight", matrix_from_1x1),
    (r"network\.{source}\.(\d+)\.token_mixer\.fc\.(.*)", r"stages.{stage}.blocks.\1.mixer.\2"),
    (r"network\.{source}\.(\d+)\.token_mixer\.(.*)", r"stages.{stage}.blocks.\1.mixer.\2"),
    (r"network\.{source}\.(\d+)\.(.*)", r"stages.{stage}.blocks.\1.\2"),
)
# The authors number stages, downsamplings and position terms in one list: where a stage stands depends on the model,
# but no number holds blocks of one stage in one model and of another in the next.
_STAGES = {0: 0, 2: 1, 4: 2, 5: 2, 6: 3, 7: 3}
_DOWNSAMPLES = {1: 1, 3: 2, 5: 3, 6: 3}
AUTHORS: KeyMap = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    *((rf"network\.{source}\.proj\.(.*)", rf"stages.{stage}.downsample.0.\1")
      for source, stage in _DOWNSAMPLES.items()),
    (r"network\.4\.pos_embed", "stages.2.downsample.position.table", _table),
    (r"network\.6\.pos_embed", "stages.3.downsample.position.table", _table),
    *(
        (pattern.replace("{source}", str(source)), ours.replace("{stage}", str(stage)), *change)
        for source, stage in _STAGES.items() for pattern, ours, *change in _BLOCK
    ),
    (r"head\.(.*)", r"head.fc.\1"),
)
TIMM: KeyMap = (
    (r"stem\.conv\.(.*)", r"stem.proj.\1"),
    (r"(stages\.\d+\.downsample)\.conv\.(.*)", r"\1.0.\2"),
    (r"(stages\.\d+\.blocks\.\d+)\.layer_scale(\d)\.scale", r"\1.scale\2.0.gamma"),
    (r"(stages\.\d+\.blocks\.\d+\.mlp\.fc\d\.weight)", r"\1", matrix_from_1x1),
    (r"head\.norm\.(.*)", r"norm.\1"),
)


def TAPS(name: str) -> dict[str, str]:
    """The authors' `network` list of a model: stages, downsamplings and, before the first attention, the position."""
    letters = SIZES[name].get("letters", "pppp")
    places = []
    for stage in range(len(letters)):
        if stage:
            places.append(f"stages.{stage}.downsample.0")
        if stage == letters.find("a"):
            places.append(f"stages.{stage}.downsample")
        places.append(f"stages.{stage}")
    return {f"network{number}": place for number, place in enumerate(places)}
