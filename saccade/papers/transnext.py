"""TransNeXt: every token sees its neighbours sharply and the whole map coarsely, as an eye does.

Aggregated attention puts the logits of the 3x3 tokens around i and of the map pooled R times a side in one softmax,
    out_i = sum_j (softmax_j(log(n_i) s (u_i + e) . k_j/|k_j| + b_ij) + [j near] t_j . u_i) v_j,   u_i = q_i/|q_i|,
over its n_i keys, with a learned query embedding e and learned tokens t that weigh the window by the query alone; b
comes from an MLP on the distance to a pooled cell. The channel mixer is a convolutional GLU,
fc2(gelu(conv(x_1)) * x_2) with x_1, x_2 = fc1(x). The last stage attends to all tokens, in the same cosine form.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", 2023, section 3.

Any grid: the map is pooled to floor(side / R) cells a side (at least one) of adaptive size, and distances are measured
in the native grid, as in the authors' code for another size.
Quirks kept: neighbours outside the map are masked and not counted in n_i; the GLU is two thirds as wide as its ratio
says; norms of blocks and stages have eps 1e-6, those of the patch embeddings and of the pooled map 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, pvt_names, within
from saccade.core.site import Site
from saccade.parts.aggregated import NAMES, AggregatedAttention, CosineAttention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Gelu
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_PUBLISHED = ("transnext_micro", "transnext_tiny", "transnext_small", "transnext_base")

CARD = Card(
    "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    authors="Shi",
    year=2023,
    systems=("transnext",),
    arxiv="2311.17132",
    code="DaiShiResearch/TransNeXt@c8a9974",
    licence="Apache-2.0",
    read="paper, code",
    keywords="aggregated attention, pixel-focused attention, length-scaled cosine attention, convolutional GLU, foveal",
    kinds=("backbone", "mixer"),
    mixers={"aggregated_attention": "AggregatedAttention", "cosine_attention": "CosineAttention"},
    params=dict(zip(_PUBLISHED, (12.8e6, 28.2e6, 49.7e6, 89.7e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (2.7e9, 5.7e9, 10.3e9, 18.4e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (82.5, 84.0, 84.7, 84.8), strict=True)),
    weights={
        f"transnext_{size}".lower(): Weights(
            f"hf:DaiShiResearch/transnext-{size.replace('_', '-')}-{side}-1k/"
            f"transnext_{size}_{side}_1k.pth")
        for size, side in (("micro", 224), ("tiny", 224), ("small", 224), ("base", 224), ("micro_AAAA", 256))
    },
    goldens=("transnext_micro", "op_transnext_aggregated_attention", "op_transnext_aggregated_attention_nonsquare",
             "op_transnext_aggregated_attention_pretrain"),
)


class ConvGlu(nn.Module):
    """fc2(gelu(conv(x_1)) * x_2), (x_1, x_2) = fc1(x): (B, *grid, C) -> (B, *grid, C), conv depthwise 3x3.

    The hidden width is two thirds of `ratio` C, which costs as much as an MLP of that ratio.
    """

    def __init__(self, rank: int, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.local = depthwise(rank, hidden, 3)
        self.activation = Gelu()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(self.activation(self.local(gate)) * value)


SIZES: dict[str, dict[str, Any]] = {
    "transnext_micro": dict(dims=(48, 96, 192, 384), depths=(2, 2, 15, 2)),
    "transnext_tiny": dict(dims=(72, 144, 288, 576), depths=(2, 2, 15, 2)),
    "transnext_small": dict(dims=(72, 144, 288, 576), depths=(5, 5, 22, 5)),
    "transnext_base": dict(dims=(96, 192, 384, 768), depths=(5, 5, 23, 5)),
    "transnext_micro_aaaa": dict(dims=(48, 96, 192, 384), depths=(2, 2, 15, 2), pooling=(16, 8, 4, 2)),
    "transnext_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), pooling=(4, 2, 1), ratios=(4, 4, 4), head_dim=16,
                           patch=2, img_size=32),
}


def transnext(
    dims: Sequence[int],
    depths: Sequence[int],
    pooling: Sequence[int] = (8, 4, 2, 1),
    ratios: Sequence[float] = (8, 8, 4, 4),
    head_dim: int = 24,
    window: int = 3,
    pool: int | None = None,
    patch: int = 4,
    qkv_bias: bool = True,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A TransNeXt of a size; a stage whose `pooling` is 1 attends to all its tokens, `pool` fixes the pooled map."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return Block(site, mixer, drop_path=drop_path, mlp=partial(ConvGlu, site.rank, ratio=ratios[site.stage]))

    mixers = [partial(AggregatedAttention, ratio=ratio, window=window, pool=pool, qkv_bias=qkv_bias) if ratio > 1
              else partial(CosineAttention, qkv_bias=qkv_bias) for ratio in pooling]
    return Pyramid(
        dims, depths, [dim // head_dim for dim in dims], stride=patch,
        stem=partial(PatchEmbed, kernel=2 * patch - 1, stride=patch, padding=patch - 1, norm=nn.LayerNorm),
        downsample=ConvMerging, block=block, mixer=mixers, stage_norm=LAYER_NORM, replace=mixer, **common,
    )


AUTHORS: KeyMap = pvt_names((*within(NAMES, r"attn\.", "mixer."), (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1")))

TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
