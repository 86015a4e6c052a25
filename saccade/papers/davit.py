"""DaViT: attention among the tokens of a window, then attention among channels.

Blocks alternate. Spatial ones attend inside windows of M x M, without a position bias,
    out = softmax(q k^T / sqrt(d)) v.
Channel ones transpose the question: in each group of d channels a channel is a token, described by what it holds over
the whole image, so a d x d map lets all N positions meet, in linear time,
    out = (softmax(k^T v / sqrt(d)) q^T)^T.
Depthwise 3x3 convolutions, added to x before the attention and before the MLP, tell where tokens stand.

Ding et al., "DaViT: Dual Attention Vision Transformers", 2022, sections 3.2-3.3.

Any grid: windows zero-pad a grid that is no multiple of them at its end, after the norm and before qkv, without a mask
(the authors' code, for classification and dense prediction alike); odd sides are zero-padded before they are halved. In
the authors' code k and v make the channel map and q is what it mixes; so it is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import note
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.ops.window import pad_to_multiple
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.head import Head
from saccade.parts.mlp import Mlp
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed
from saccade.parts.window import WindowAttention

_PUBLISHED = ("davit_tiny", "davit_small", "davit_base")

CARD = Card(
    "DaViT: Dual Attention Vision Transformers",
    authors="Ding, Xiao, Codella, Luo, Wang, Yuan",
    year=2022,
    systems=("davit",),
    arxiv="2204.03645",
    code="dingmyu/davit@fc79470",
    licence="MIT",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="dual attention, channel group attention, window attention, convolutional position encoding",
    kinds=("backbone", "mixer"),
    mixers={"channel_group": "ChannelGroup", "window": "Window"},
    params=dict(zip(_PUBLISHED, (28.3e6, 49.7e6, 87.9e6), strict=True)) | {"davit_large_window12_384": 196.8e6},
    macs=dict(zip(_PUBLISHED, (4.5e9, 8.8e9, 15.5e9), strict=True)) | {"davit_large_window12_384": 103.0e9},
    # The giant was trained on 1.5 billion pairs of images and texts.
    top1=dict(zip(_PUBLISHED, (82.8, 84.2, 84.6), strict=True)) | {"davit_giant": 90.4},
    weights={
        name: Weights(f"timm:{name}.msft_in1k", layout="timm", crop=0.95, licence="Apache-2.0")
        for name in _PUBLISHED
    },
    goldens=("davit_tiny", "op_davit_channel_attention", "op_davit_channel_block", "op_davit_spatial_block"),
    tests=("tests/papers/test_davit.py",),
)


class Window(WindowAttention):
    """Attention inside windows without a position bias: (B, *grid, C) -> (B, *grid, C)."""

    template = Template("q k^T / sqrt(d), in windows", "softmax", "sum of v")

    def __init__(self, site: Site, window: int | tuple[int, ...] = 7, qkv_bias: bool = True) -> None:
        super().__init__(site, window, qkv_bias, bias=False)


class ChannelGroup(nn.Module):
    """out = proj((softmax(k^T v / sqrt(d)) q^T)^T) in each group of d = C / heads channels, over all N tokens.

    (B, *grid, C) -> (B, *grid, C). (Ding et al., DaViT, 2022, section 3.3.)
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "k^T v / sqrt(d): channels, not tokens",
        "softmax over channels",
        "q times it: every token weighs its own channels",
    )

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        self.scale = check_heads(site) ** -0.5
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        B, N, C = tokens.shape
        q, k, v = self.qkv(tokens).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # Fused attention is made for many tokens of few channels; here it is the reverse, and two products are faster.
        weights = (k.mT @ v * self.scale).softmax(-1)  # (B, heads, d, d)
        note(weights)
        out = (q @ weights.mT).transpose(1, 2).reshape(x.shape)
        return self.proj(out)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N C d for the products among d channels."""
        tokens = torch.Size(grid).numel()
        return 4 * tokens * site.dim**2 + 2 * tokens * site.dim * (site.dim // site.heads)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, through the channel map."""
        return None


class DualBlock(Block):
    """x += conv(x); x += tail(mixer(norm(x))); x += conv(x); x += tail(mlp(norm(x))), on grids (B, *grid, C)."""

    def __init__(self, site: Site, mixer: nn.Module, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.position1 = depthwise(site.rank, site.dim, 3)
        self.position2 = depthwise(site.rank, site.dim, 3)

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        x = x + self.position1(x)
        x = x + self.scale1(self.mixer(self.norm1(x), **optional))
        x = x + self.position2(x)
        return x + self.scale2(self.mlp(self.norm2(x)))


class Downsample(nn.Sequential):
    """norm, then a convolution of stride 2: 2x2 patches, or 3x3 where they overlap."""

    def __init__(self, rank: int, dim: int, out_dim: int, overlapped: bool = False) -> None:
        kernel, padding = (3, 1) if overlapped else (2, 0)
        super().__init__(nn.LayerNorm(dim), grid_conv(rank, dim, out_dim, kernel, stride=2, padding=padding))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](pad_to_multiple(self[0](x), (2,) * (x.ndim - 2)))


# Depths count pairs, a spatial block and a channel block, as the paper's table does.
_HEADS = (3, 6, 12, 24)
_LARGE: dict[str, Any] = dict(dims=(192, 384, 768, 1536), depths=(1, 1, 9, 1), heads=(6, 12, 24, 48))
SIZES: dict[str, dict[str, Any]] = {
    "davit_tiny": dict(dims=(96, 192, 384, 768), depths=(1, 1, 3, 1), heads=_HEADS),
    "davit_small": dict(dims=(96, 192, 384, 768), depths=(1, 1, 9, 1), heads=_HEADS),
    "davit_base": dict(dims=(128, 256, 512, 1024), depths=(1, 1, 9, 1), heads=(4, 8, 16, 32)),
    "davit_large": _LARGE,
    "davit_large_window12_384": _LARGE | dict(window=12, img_size=384),
    "davit_huge": dict(dims=(256, 512, 1024, 2048), depths=(1, 1, 9, 1), heads=(8, 16, 32, 64)),
    "davit_giant": dict(dims=(384, 768, 1536, 3072), depths=(1, 1, 12, 3), heads=(12, 24, 48, 96)),
    "davit_nano": dict(dims=(32, 64, 128), depths=(1, 1, 1), heads=(1, 2, 4), window=4, patch=2, img_size=32),
}


def davit(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int = 7,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    order: Sequence[str] = ("spatial", "channel"),
    overlapped: bool = False,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A DaViT of a size; `order` are the kinds of attention that take turns (the paper's ablation varies them)."""
    kinds: dict[str, MixerFactory] = {
        "spatial": partial(Window, window=window, qkv_bias=qkv_bias),
        "channel": partial(ChannelGroup, qkv_bias=qkv_bias),
    }
    if not order or set(order) - set(kinds):
        raise SaccadeError(f'order={tuple(order)!r}: name one or more of "spatial" and "channel"')
    stem = partial(PatchEmbed, stride=patch, kernel=2 * patch - 1, padding=patch - 1, norm=nn.LayerNorm)
    return Pyramid(
        dims, [depth * len(order) for depth in depths], heads, stem=stem, stride=patch,
        downsample=partial(Downsample, overlapped=overlapped),
        block=partial(DualBlock, norm=nn.LayerNorm, mlp=partial(Mlp, ratio=mlp_ratio)),
        mixer=lambda site: kinds[order[site.index % len(order)]](site), head=partial(Head, norm=nn.LayerNorm),
        replace=mixer, **common,
    )


def block_names(blocks: str, kinds: int = 2) -> KeyMap:
    """Rules for names like `{blocks}.pair.kind.attn.*`, where the pattern `blocks` holds the stage as its group 1."""
    pairs = range(max(max(size["depths"]) for size in SIZES.values()))
    inner = ((r"cpe(?:\.0|1)\.proj\.(.*)", r"position1.\2"), (r"cpe(?:\.1|2)\.proj\.(.*)", r"position2.\2"),
             (r"attn\.(.*)", r"mixer.\2"), (r"(.*)", r"\2"))
    return tuple(
        (rf"{blocks}\.{pair}\.{kind}\.{theirs}", rf"stages.\1.blocks.{pair * kinds + kind}.{ours}")
        for pair in pairs for kind in range(kinds) for theirs, ours in inner
    )


def authors_names(kinds: int = 2) -> KeyMap:
    """The authors' names in a network where `kinds` kinds of attention take turns."""
    return (
        (r"patch_embeds\.0\.(.*)", r"stem.\1"),
        (r"patch_embeds\.(\d+)\.norm\.(.*)", r"stages.\1.downsample.0.\2"),
        (r"patch_embeds\.(\d+)\.proj\.(.*)", r"stages.\1.downsample.1.\2"),
        (r"norms\.(.*)", r"head.norm.\1"),
        (r"head\.(.*)", r"head.fc.\1"),
        *block_names(r"main_blocks\.(\d+)", kinds),
    )


AUTHORS = authors_names()
TIMM: KeyMap = (
    (r"stem\.conv\.(.*)", r"stem.proj.\1"),
    (r"stages\.(\d+)\.downsample\.norm\.(.*)", r"stages.\1.downsample.0.\2"),
    (r"stages\.(\d+)\.downsample\.conv\.(.*)", r"stages.\1.downsample.1.\2"),
    *block_names(r"stages\.(\d+)\.blocks"),
)
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
