"""FocalNet: focal modulation, attention turned round: aggregate first, then let each query meet the summary.

Self-attention lets a query meet every key and sums what comes out. Focal modulation sums first: depthwise convolutions
on top of each other give contexts of growing reach, z_l = gelu(conv_l(z_(l-1))), the last one the mean of the map;
gates of the token itself weigh the levels, and the query is multiplied by the sum,
    out = proj(q * h(sum_l g_l z_l)),   (q, z_0, g) = f(x).
The pyramid around it is Swin's.

Yang, Li, Dai, Gao, "Focal Modulation Networks", 2022, section 3.

Any grid: an image is zero-padded to whole patches; between stages a last odd row or column is padded too (patches) or
covered by the convolution (overlapping). Quirks kept: gates are linear, without a sigmoid; the mean too goes through
GELU; the overlapping 7x7 stem pads by 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.record import note
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.window import pad_to_multiple
from saccade.parts.block import Block
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.mlp import Gelu
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_RELEASE = "https://github.com/microsoft/FocalNet/releases/download/v1.0.0/"
_ADDRESS = "https://projects4jw.blob.core.windows.net/focalnet/release/classification/"

CARD = Card(
    "Focal Modulation Networks",
    authors="Yang, Li, Dai, Gao",
    year=2022,
    systems=("focalnet",),
    arxiv="2203.11926",
    code="microsoft/FocalNet@e8514bd",
    licence="MIT",
    read="paper",
    keywords="focal modulation, hierarchical contextualization, gated aggregation, attention-free",
    kinds=("backbone", "mixer"),
    mixers={"focal_modulation": "FocalModulation"},
    params={"focalnet_tiny_srf": 28.4e6, "focalnet_tiny_lrf": 28.6e6, "focalnet_small_srf": 49.9e6,
            "focalnet_small_lrf": 50.3e6, "focalnet_base_srf": 88.1e6, "focalnet_base_lrf": 88.7e6,
            "focalnet_tiny_iso_16": 5.9e6, "focalnet_small_iso_16": 22.4e6, "focalnet_base_iso_16": 87.2e6},
    macs={"focalnet_tiny_srf": 4.4e9, "focalnet_tiny_lrf": 4.5e9, "focalnet_small_srf": 8.6e9,
          "focalnet_small_lrf": 8.7e9, "focalnet_base_srf": 15.3e9, "focalnet_base_lrf": 15.4e9,
          "focalnet_tiny_iso_16": 1.1e9, "focalnet_small_iso_16": 4.3e9, "focalnet_base_iso_16": 16.9e9},
    top1={"focalnet_tiny_srf": 82.1, "focalnet_tiny_lrf": 82.3, "focalnet_small_srf": 83.4,
          "focalnet_small_lrf": 83.5, "focalnet_base_srf": 83.7, "focalnet_base_lrf": 83.9,
          "focalnet_tiny_iso_16": 74.1, "focalnet_small_iso_16": 80.9, "focalnet_base_iso_16": 82.4},
    weights={
        **{f"focalnet_{size}_{field}": Weights(f"{_RELEASE}focalnet_{size}_{field}.pth",
                                               mirrors=(f"{_ADDRESS}focalnet_{size}_{field}.pth",))
           for size in ("tiny", "small", "base") for field in ("srf", "lrf")},
        **{f"focalnet_{size}_iso_16": Weights(f"{_ADDRESS}focalnet_{size}_iso_16.pth")
           for size in ("tiny", "small", "base")},
        **{f"focalnet_{name}": Weights(f"{address}{file}.pth", data="ImageNet-22K")
           for name, address, file in (
               ("large_fl3", _RELEASE, "focalnet_large_lrf_384"), ("large_fl4", _RELEASE, "focalnet_large_lrf_384_fl4"),
               ("xlarge_fl3", _RELEASE, "focalnet_xlarge_lrf_384"),
               ("xlarge_fl4", _RELEASE, "focalnet_xlarge_lrf_384_fl4"),
               ("huge_fl3", _ADDRESS, "focalnet_huge_lrf_224"), ("huge_fl4", _ADDRESS, "focalnet_huge_lrf_224_fl4"))},
    },
    goldens=("focalnet_tiny_srf", "op_focal_modulation", "op_focal_modulation_postln"),
)


class FocalModulation(nn.Module):
    """out = proj(q * h(sum_l g_l z_l)), (q, z_0, g) = f(x), z_l = gelu(conv_l(z_(l-1))), the last z the mean.

    (B, *grid, C) -> (B, *grid, C). Level l has a depthwise kernel of `window` + 2 l; `normalized` divides the sum by
    the number of levels; `norm_inside` puts a norm before proj. (Yang et al., 2022, equations 4-7.)
    """

    ranks = (1, 2, 3)
    template = Template(
        "w[j - i] of growing kernels, and the mean", "gates of the query, a level", "sum of contexts, times q"
    )

    def __init__(
        self, site: Site, window: int = 3, levels: int = 2, normalized: bool = False, norm_inside: bool = False
    ) -> None:
        super().__init__()
        self.kernels = tuple(window + 2 * level for level in range(levels))
        self.normalized = normalized
        self.f = nn.Linear(site.dim, 2 * site.dim + levels + 1)
        self.levels = nn.ModuleList(depthwise(site.rank, site.dim, kernel, bias=False) for kernel in self.kernels)
        self.activation = Gelu()
        self.h = nn.Linear(site.dim, site.dim)
        self.norm = nn.LayerNorm(site.dim) if norm_inside else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        C, count = x.shape[-1], len(self.levels)
        q, z, gates = self.f(x).split((C, C, count + 1), -1)
        note(gates)
        context = torch.zeros_like(z)
        for number, level in enumerate(self.levels):
            z = self.activation(level(z))
            context = context + z * gates[..., number, None]
        mean = self.activation(z.flatten(1, -2).mean(1)).view(x.shape[0], *[1] * (x.ndim - 2), C)
        context = context + mean * gates[..., count, None]
        if self.normalized:
            context = context / (count + 1)
        return self.proj(self.norm(q * self.h(context)))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C (4 C + levels + 1 + the sum of kernel^rank)."""
        each = 4 * site.dim + len(self.kernels) + 1 + sum(kernel**site.rank for kernel in self.kernels)
        return torch.Size(grid).numel() * site.dim * each

    def reach(self, site: Site) -> None:
        """Every token reaches every other, through the mean."""
        return None


class PostNormBlock(Block):
    """x += tail(norm(mixer(x))); x += tail(norm(mlp(x))): norms at the end of the branches, for large models."""

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        x = x + self.scale1(self.norm1(self.mixer(x, **optional)))
        return x + self.scale2(self.norm2(self.mlp(x)))


class Downsample(nn.Module):
    """A convolution of stride 2, 2x2 patches or overlapping 3x3, then a norm."""

    def __init__(self, rank: int, dim: int, out_dim: int, overlapped: bool = False) -> None:
        super().__init__()
        kernel, padding = (3, 1) if overlapped else (2, 0)
        self.proj = grid_conv(rank, dim, out_dim, kernel, stride=2, padding=padding)
        self.norm = nn.LayerNorm(out_dim)
        self.whole_patches = not overlapped

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_multiple(x, (2,) * (x.ndim - 2)) if self.whole_patches else x))


_SMALL: dict[str, Any] = dict(dims=(96, 192, 384, 768), depths=(2, 2, 18, 2))
_BASE: dict[str, Any] = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2))
_LARGE: dict[str, Any] = dict(depths=(2, 2, 18, 2), overlapped=True, post_norm=True, layer_scale=1e-4, img_size=384)
_WIDE, _WIDER, _WIDEST = (dict(dims=tuple(dim * 2**stage for stage in range(4))) for dim in (192, 256, 352))
_HUGE: dict[str, Any] = _LARGE | _WIDEST | dict(norm_inside=True, img_size=224)
_ISO: dict[str, Any] = dict(depths=(12,), patch=16, levels=3)
SIZES: dict[str, dict[str, Any]] = {
    "focalnet_tiny_srf": _SMALL | dict(depths=(2, 2, 6, 2)),
    "focalnet_tiny_lrf": _SMALL | dict(depths=(2, 2, 6, 2), levels=3),
    "focalnet_small_srf": _SMALL,
    "focalnet_small_lrf": _SMALL | dict(levels=3),
    "focalnet_base_srf": _BASE,
    "focalnet_base_lrf": _BASE | dict(levels=3),
    "focalnet_large_fl3": _LARGE | _WIDE | dict(levels=3, window=5),
    "focalnet_large_fl4": _LARGE | _WIDE | dict(levels=4),
    "focalnet_xlarge_fl3": _LARGE | _WIDER | dict(levels=3, window=5),
    "focalnet_xlarge_fl4": _LARGE | _WIDER | dict(levels=4),
    "focalnet_huge_fl3": _HUGE | dict(levels=3),
    "focalnet_huge_fl4": _HUGE | dict(levels=4),
    "focalnet_tiny_iso_16": _ISO | dict(dims=(192,)),
    "focalnet_small_iso_16": _ISO | dict(dims=(384,)),
    "focalnet_base_iso_16": _ISO | dict(dims=(768,), post_norm=True, layer_scale=1e-4),
    "focalnet_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), patch=2, img_size=32),
}


def focalnet(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    window: int = 3,
    levels: int = 2,
    patch: int = 4,
    overlapped: bool = False,
    post_norm: bool = False,
    norm_inside: bool = False,
    normalized: bool = False,
    layer_scale: float | None = None,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A FocalNet of a size (one stage: isotropic); heads of 32 channels for the mixers that want some."""
    kernel, padding = (7, 2) if overlapped else (None, 0)
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=kernel, stride=patch, padding=padding, norm=nn.LayerNorm), stride=patch,
        downsample=partial(Downsample, overlapped=overlapped),
        block=partial(PostNormBlock if post_norm else Block, norm=nn.LayerNorm, layer_scale=layer_scale),
        mixer=partial(FocalModulation, window=window, levels=levels, normalized=normalized, norm_inside=norm_inside),
        norm=nn.LayerNorm, replace=mixer, **common,
    )


MIXER: KeyMap = (
    (r"focal_layers\.(\d+)\.0\.(.*)", r"levels.\1.\2"),
    (r"h\.weight", "h.weight", matrix_from_1x1),
    (r"ln\.(.*)", r"norm.\1"),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    *within(MIXER, r"layers\.(\d+)\.blocks\.(\d+)\.modulation\.", r"stages.\1.blocks.\2.mixer."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.gamma_(\d)", r"stages.\1.blocks.\2.scale\3.0.gamma"),
    *((rf"layers\.{stage}\.downsample\.(.*)", rf"stages.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"layers\.(\d+)\.(.*)", r"stages.\1.\2"),
    (r"head\.(.*)", r"head.fc.\1"),
)
# The authors' stage outputs are taken after the downsampling that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
