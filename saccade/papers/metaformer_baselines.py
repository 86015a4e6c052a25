"""MetaFormer baselines: how far the block goes with the plainest mixers.

The MetaFormer block with a mixer nobody has to design,
    x = r1 x + mix(norm(x));   x = r2 x + mlp(norm(x)),
where r scales the residual a channel (last two stages), no layer has a bias, and the activation is StarReLU,
s relu(x)^2 + b with learned s and b. mix is nothing (IdentityFormer), average pooling (PoolFormerV2), one random matrix
over positions that is never trained (RandFormer, last two stages), a 7x7 depthwise convolution between two linear
layers, pw2(conv(star(pw1 x))) (ConvFormer), or that in two stages and self-attention in two (CAFormer).

Yu, Si, Zhou, Luo, Zhou, Feng, Yan, Wang, "MetaFormer Baselines for Vision", 2022, sections 2-3.

Any grid: convolutions pad with zeros, pooling averages inside the map, the random matrix is resampled (bicubic) on both
its axes, rows kept in sum. Quirks kept: the networks of one mixer normalise over the whole map, ConvFormer and CAFormer
over channels; ConvFormer's and CAFormer's heads are an MLP with squared ReLU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, pointwise
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block, Scale
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.head import Head
from saccade.parts.mlp import Mlp
from saccade.parts.norm import GroupNorm1
from saccade.parts.pyramid import Pyramid
from saccade.parts.spatial import Identity, Pooling, SpatialFc
from saccade.parts.stem import PatchEmbed

_ADDRESS = "hf:sail/dl/"
_BASIC = ("s12", "s24", "s36", "m36", "m48")
_COMMON = ("s18", "s36", "m36", "b36")

# Millions of parameters (RandFormer: of those that are trained), billions of multiply-adds, top-1 in percent.
_PUBLISHED = {
    "identityformer_s12": (11.9, 1.8, 74.6), "identityformer_s24": (21.3, 3.4, 78.2),
    "identityformer_s36": (30.8, 5, 79.3), "identityformer_m36": (56.1, 8.8, 80.0),
    "identityformer_m48": (73.3, 11.5, 80.4), "randformer_s12": (11.9, 1.9, 76.6),
    "randformer_s24": (21.3, 3.5, 78.2), "randformer_s36": (30.8, 5.2, 79.5), "randformer_m36": (56.1, 9, 81.2),
    "randformer_m48": (73.3, 11.9, 81.4), "poolformerv2_s12": (11.9, 1.8, 78.0),
    "poolformerv2_s24": (21.3, 3.4, 80.7), "poolformerv2_s36": (30.8, 5, 81.6), "poolformerv2_m36": (56.1, 8.8, 82.2),
    "poolformerv2_m48": (73.3, 11.5, 82.6), "convformer_s18": (27, 3.9, 83.0), "convformer_s36": (40, 7.6, 84.1),
    "convformer_m36": (57, 12.8, 84.5), "convformer_b36": (100, 22.6, 84.8), "caformer_s18": (26, 4.1, 83.6),
    "caformer_s36": (39, 8, 84.5), "caformer_m36": (56, 13.2, 85.2), "caformer_b36": (99, 23.2, 85.5),
    "convformer_s18_384": (27, 11.6, 84.4), "convformer_s36_384": (40, 22.4, 85.4),
    "convformer_m36_384": (57, 37.7, 85.6), "convformer_b36_384": (100, 66.5, 85.7),
    "caformer_s18_384": (26, 13.4, 85.0), "caformer_s36_384": (39, 26, 85.7), "caformer_m36_384": (56, 42, 86.2),
    "caformer_b36_384": (99, 72.2, 86.4), "convformer_s18_in21ft1k": (27, 3.9, 83.7),
    "convformer_s36_in21ft1k": (40, 7.6, 85.4), "convformer_m36_in21ft1k": (57, 12.8, 86.1),
    "convformer_b36_in21ft1k": (100, 22.6, 87.0), "caformer_s18_in21ft1k": (26, 4.1, 84.1),
    "caformer_s36_in21ft1k": (39, 8, 85.8), "caformer_m36_in21ft1k": (56, 13.2, 86.6),
    "caformer_b36_in21ft1k": (99, 23.2, 87.4), "convformer_s18_384_in21ft1k": (27, 11.6, 85.0),
    "convformer_s36_384_in21ft1k": (40, 22.4, 86.4), "convformer_m36_384_in21ft1k": (57, 37.7, 86.9),
    "convformer_b36_384_in21ft1k": (100, 66.5, 87.6), "caformer_s18_384_in21ft1k": (26, 13.4, 85.4),
    "caformer_s36_384_in21ft1k": (39, 26, 86.9), "caformer_m36_384_in21ft1k": (56, 42, 87.5),
    "caformer_b36_384_in21ft1k": (99, 72.2, 88.1),
}

CARD = Card(
    "MetaFormer Baselines for Vision",
    authors="Yu, Si, Zhou, Luo, Zhou, Feng, Yan, Wang",
    year=2022,
    arxiv="2210.13452",
    code="sail-sg/metaformer@64c534a",
    licence="Apache-2.0",
    read="paper, code",
    keywords="IdentityFormer, RandFormer, PoolFormerV2, ConvFormer, CAFormer, separable convolution, StarReLU, "
             "random mixing, residual scaling",
    kinds=("backbone", "mixer"),
    mixers={"separable_conv": "SeparableConv", "random_mixing": "RandomMixing"},
    params={name: row[0] * 1e6 for name, row in _PUBLISHED.items()},
    macs={name: row[1] * 1e9 for name, row in _PUBLISHED.items()},
    top1={name: row[2] for name, row in _PUBLISHED.items()},
    weights={
        f"{family}_{size}{suffix}": Weights(f"{_ADDRESS}{family}/{family}_{size}{suffix}.pth", data=data, crop=1.0)
        for families, sizes, suffixes in (
            (("identityformer", "randformer", "poolformerv2"), _BASIC, {"": "ImageNet-1K"}),
            (("convformer", "caformer"), _COMMON, {
                "": "ImageNet-1K", "_384": "ImageNet-1K", "_in21k": "ImageNet-22K",
                "_in21ft1k": "ImageNet-22K, ImageNet-1K", "_384_in21ft1k": "ImageNet-22K, ImageNet-1K"}),
        )
        for family in families for size in sizes for suffix, data in suffixes.items()
    },
    tests=("tests/papers/test_metaformer_baselines.py",),
)


class StarReLU(nn.Module):
    """s relu(x)^2 + b with one learned s and b: GELU's accuracy at a fraction of its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x).square() + self.bias


class SeparableConv(nn.Module):
    """pw2(conv(star(pw1 x))): a depthwise convolution between two linear layers, `ratio` C channels wide; no biases.

    (B, *grid, C) -> (B, *grid, C). (Sandler et al., "MobileNetV2", 2018, turned to a token mixer.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i], a number a channel and offset", "none", "sum of star(W1 x)")

    def __init__(self, site: Site, kernel: int = 7, ratio: float = 2.0) -> None:
        super().__init__()
        self.kernel, self.width = kernel, int(ratio * site.dim)
        self.pw1 = nn.Linear(site.dim, self.width, bias=False)
        self.activation = StarReLU()
        self.conv = depthwise(site.rank, self.width, kernel, bias=False)
        self.pw2 = nn.Linear(self.width, site.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.conv(self.activation(self.pw1(x))))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N W (2 C + kernel^rank), W the width between the linear layers."""
        return torch.Size(grid).numel() * self.width * (2 * site.dim + self.kernel**site.rank)

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


class RandomMixing(SpatialFc):
    """out = W x over positions, W the softmax of random numbers: drawn once, kept with the weights, never trained."""

    template = Template("w[i, j] of the place, drawn once", "softmax", "sum of x")

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        drawn = torch.rand_like(self.weight, requires_grad=False).softmax(-1)
        del self.weight
        self.register_buffer("weight", drawn)


class PlainAttention(Attention):
    """Self-attention without any bias."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, qkv_bias=False)
        self.proj = nn.Linear(site.dim, site.dim, bias=False)


class MapNorm(GroupNorm1):
    """A norm of an image over its whole map and all channels, with a weight a channel and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)
        self.register_parameter("bias", None)


CHANNEL_NORM = partial(nn.LayerNorm, eps=1e-6, bias=False)


class RescaledBlock(Block):
    """x = r1 x + tail(mixer(norm(x))); x = r2 x + tail(mlp(norm(x))); r, a factor a channel, only where `rescale`."""

    def __init__(self, site: Site, mixer: nn.Module, *, rescale: bool, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.residual1 = Scale(site.dim, 1.0) if rescale else nn.Identity()
        self.residual2 = Scale(site.dim, 1.0) if rescale else nn.Identity()

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        x = self.residual1(x) + self.scale1(self.mixer(self.norm1(x), **optional))
        return self.residual2(x) + self.scale2(self.mlp(self.norm2(x)))


class SquaredReLU(nn.Module):
    """relu(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class MlpHead(Head):
    """fc2(norm(relu(fc1(norm(pool(x))))^2)): (B, *grid, C) -> (B, classes), 4 C wide."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool, norm=LAYER_NORM)
        if num_classes:
            self.fc = nn.Sequential(
                nn.Linear(dim, 4 * dim), SquaredReLU(), nn.LayerNorm(4 * dim), nn.Linear(4 * dim, num_classes))


MIXERS: dict[str, MixerFactory] = {
    "i": Identity, "p": Pooling, "r": RandomMixing, "c": SeparableConv, "a": PlainAttention,
}


def _sizes() -> dict[str, dict[str, Any]]:
    small, middle = (64, 128, 320, 512), (96, 192, 384, 768)
    depths = {12: (2, 2, 6, 2), 24: (4, 4, 12, 4), 36: (6, 6, 18, 6), 48: (8, 8, 24, 8)}
    table: dict[str, dict[str, Any]] = {}
    for family, letters in (("identityformer", "iiii"), ("randformer", "iirr"), ("poolformerv2", "pppp")):
        for size in _BASIC:
            dims = small if size[0] == "s" else middle
            table[f"{family}_{size}"] = dict(letters=letters, dims=dims, depths=depths[int(size[1:])])
    widths = {"s18": small, "s36": small, "m36": (96, 192, 384, 576), "b36": (128, 256, 512, 768)}
    for family, letters in (("convformer", "cccc"), ("caformer", "ccaa")):
        for size, dims in widths.items():
            own = dict(letters=letters, dims=dims, depths=(3, 3, 9, 3) if size == "s18" else (3, 12, 18, 3))
            name = f"{family}_{size}"
            table |= {f"{name}{data}": own for data in ("", "_in21ft1k")}
            table |= {f"{name}_384{data}": own | dict(img_size=384) for data in ("", "_in21ft1k")}
            table[f"{name}_in21k"] = own | dict(num_classes=21841)
    nano: dict[str, Any] = dict(dims=(32, 64, 128), depths=(1, 2, 2), patch=2, img_size=32)
    return table | {"caformer_nano": nano | dict(letters="cca"), "randformer_nano": nano | dict(letters="ipr")}


SIZES = _sizes()


def metaformer_baselines(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    letters: str,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A baseline whose stages mix as `letters` say (i, p, r, c, a); heads of 32 channels where there is attention."""
    shared = set(letters) & set("ca")  # ConvFormer and CAFormer
    norm = CHANNEL_NORM if shared else MapNorm

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        mlp = partial(Mlp, activation=StarReLU, bias=False)
        return RescaledBlock(site, mixer, rescale=site.stage >= 2, drop_path=drop_path, norm=norm, mlp=mlp)

    def downsample(rank: int, dim: int, out_dim: int) -> nn.Module:
        return nn.Sequential(CHANNEL_NORM(dim), grid_conv(rank, dim, out_dim, 3, stride=2, padding=1))

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=2 * patch - 1, stride=patch, padding=patch // 2, norm=CHANNEL_NORM),
        stride=patch, downsample=downsample, block=block, mixer=[MIXERS[letter] for letter in letters],
        head=MlpHead if shared else partial(Head, norm=LAYER_NORM), replace=mixer, **common,
    )


_BLOCK = r"stages\.(\d+)\.(?:blocks\.)?(\d+)\."
_OURS = r"stages.\1.blocks.\2."
_NAMES: KeyMap = (
    (_BLOCK + r"token_mixer\.random_matrix", _OURS + "mixer.weight"),
    (_BLOCK + r"token_mixer\.pwconv(\d)\.(.*)", _OURS + r"mixer.pw\3.\4", pointwise),
    (_BLOCK + r"token_mixer\.act1\.(.*)", _OURS + r"mixer.activation.\3"),
    (_BLOCK + r"token_mixer\.dwconv\.(.*)", _OURS + r"mixer.conv.\3"),
    (_BLOCK + r"token_mixer\.(.*)", _OURS + r"mixer.\3"),
    (_BLOCK + r"mlp\.act\.(.*)", _OURS + r"mlp.activation.\3"),
    (_BLOCK + r"mlp\.(fc\d\..*)", _OURS + r"mlp.\3", pointwise),
    (_BLOCK + r"res_scale(\d)\.scale", _OURS + r"residual\3.gamma"),
    (_BLOCK + r"(norm\d\..*)", _OURS + r"\3"),
)
AUTHORS: KeyMap = (
    *_NAMES,
    (r"downsample_layers\.0\.conv\.(.*)", r"stem.proj.\1"),
    (r"downsample_layers\.0\.post_norm\.(.*)", r"stem.norm.\1"),
    (r"downsample_layers\.(\d+)\.pre_norm\.(.*)", r"stages.\1.downsample.0.\2"),
    (r"downsample_layers\.(\d+)\.conv\.(.*)", r"stages.\1.downsample.1.\2"),
    (r"norm\.(.*)", r"head.norm.\1"),
    *((rf"head\.{theirs}\.(.*)", rf"head.fc.{ours}.\1") for theirs, ours in (("fc1", 0), ("norm", 2), ("fc2", 3))),
    (r"head\.(.*)", r"head.fc.\1"),
)
TIMM: KeyMap = (
    *_NAMES,
    (r"stem\.conv\.(.*)", r"stem.proj.\1"),
    (r"stages\.(\d+)\.downsample\.norm\.(.*)", r"stages.\1.downsample.0.\2"),
    (r"stages\.(\d+)\.downsample\.conv\.(.*)", r"stages.\1.downsample.1.\2"),
    *((rf"head\.fc\.{theirs}\.(.*)", rf"head.fc.{ours}.\1") for theirs, ours in (("fc1", 0), ("norm", 2), ("fc2", 3))),
)
TAPS = {r"stage(\d)": r"stages.\1"}
