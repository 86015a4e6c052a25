"""NAT and DiNAT: every token looks at its own nearest neighbours.

Token i attends to the k x k tokens around it, N(i), with a learned bias a relative offset,
    out_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(d) + b[j - i]) v_j,
and at the borders the neighborhood moves inwards: every token sees exactly k^2 others. DiNAT lets every second block
take its neighbours `dilation` steps apart, so that local and sparse global blocks alternate and the field of view grows
exponentially at no cost. DiNAT_s is the same in Swin's layout. The isotropic models keep one grid of 16x16 patches,
as a ViT does, without class token and position table; ViT-rpb, their rival, has all tokens for N(i).

Hassani, Walton, Li, Li, Shi, "Neighborhood Attention Transformer", 2023, section 3.
Hassani, Shi, "Dilated Neighborhood Attention Transformer", 2022, section 3.

Any grid: one shorter than kernel x dilation is zero-padded at its end, before qkv and without a mask, and cropped
before proj, as in the authors' code (classification and dense prediction alike). ViT-rpb's bias, which has an entry for
every offset of the native grid, is resampled (bicubic over the offsets).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.neighborhood import neighborhood_attention
from saccade.ops.sizes import larger
from saccade.ops.toeplitz import attend_at_offsets
from saccade.ops.window import crop, pad_end
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import CONVOLUTIONS, grid_conv
from saccade.parts.isotropic import Isotropic
from saccade.parts.merging import PatchMerging
from saccade.parts.mlp import Mlp
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed
from saccade.parts.tokens import global_tokens

_ADDRESS = "https://shi-labs.com/projects/"
_DINAT = f"{_ADDRESS}dinat/checkpoints/"
_LAYER_NORM = nn.LayerNorm  # eps 1e-5

CARD = Card(
    "Dilated Neighborhood Attention Transformer (and Neighborhood Attention Transformer)",
    authors="Hassani, Walton, Li, Li, Shi",
    year=2022,
    systems=("dinat",),
    arxiv="2209.15001, 2204.07143",
    code="SHI-Labs/Neighborhood-Attention-Transformer@d334f5b",
    licence="MIT",
    read="paper, code",
    keywords="neighborhood attention, dilation, sliding window, local attention, relative position bias, NATTEN",
    kinds=("backbone", "mixer"),
    mixers={"neighborhood": "Neighborhood", "relative_attention": "RelativeAttention"},
    params={"nat_mini": 20e6, "nat_tiny": 28e6, "nat_small": 51e6, "nat_base": 90e6, "dinat_mini": 20e6,
            "dinat_tiny": 28e6, "dinat_small": 51e6, "dinat_base": 90e6, "dinat_large": 200e6, "dinat_large_384": 200e6,
            "dinat_large_384_11x11": 200e6, "dinat_s_tiny": 28e6, "dinat_s_small": 50e6, "dinat_s_base": 88e6,
            "dinat_s_large": 197e6, "dinat_s_large_384": 197e6, "nat_isotropic_small": 22e6, "nat_isotropic_base": 86e6,
            "dinat_isotropic_small": 22e6, "dinat_isotropic_base": 86e6, "vitrpb_small": 22e6, "vitrpb_base": 86e6},
    macs={"nat_mini": 2.7e9, "nat_tiny": 4.3e9, "nat_small": 7.8e9, "nat_base": 13.7e9, "dinat_mini": 2.7e9,
          "dinat_tiny": 4.3e9, "dinat_small": 7.8e9, "dinat_base": 13.7e9, "dinat_large": 30.6e9,
          "dinat_large_384": 89.7e9, "dinat_large_384_11x11": 92.4e9, "dinat_s_tiny": 4.5e9, "dinat_s_small": 8.7e9,
          "dinat_s_base": 15.4e9, "dinat_s_large": 34.5e9, "dinat_s_large_384": 101.5e9, "nat_isotropic_small": 4.3e9,
          "nat_isotropic_base": 16.9e9, "dinat_isotropic_small": 4.3e9, "dinat_isotropic_base": 16.9e9,
          "vitrpb_small": 4.6e9, "vitrpb_base": 17.5e9},
    # The large models were trained on ImageNet-22K first.
    top1={"nat_mini": 81.8, "nat_tiny": 83.2, "nat_small": 83.7, "nat_base": 84.3, "dinat_mini": 81.8,
          "dinat_tiny": 82.7, "dinat_small": 83.8, "dinat_base": 84.4, "dinat_large": 86.6, "dinat_large_384": 87.4,
          "dinat_large_384_11x11": 87.5, "dinat_s_tiny": 81.8, "dinat_s_small": 83.5, "dinat_s_base": 83.8,
          "dinat_s_large": 86.5, "dinat_s_large_384": 87.4, "nat_isotropic_small": 80.0, "nat_isotropic_base": 81.6,
          "dinat_isotropic_small": 80.8, "dinat_isotropic_base": 82.1, "vitrpb_small": 81.2, "vitrpb_base": 82.5},
    weights={
        **{name: Weights(f"{_ADDRESS}nat/checkpoints/CLS/{name}.pth")
           for name in ("nat_mini", "nat_tiny", "nat_small", "nat_base")},
        **{name: Weights(f"{_DINAT}imagenet1k/{name}_in1k_224.pth")
           for name in ("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_s_tiny", "dinat_s_small",
                        "dinat_s_base")},
        **{name: Weights(f"{_DINAT}imagenet1k/{file}.pth", data="ImageNet-22K, ImageNet-1K")
           for name, file in (("dinat_large", "dinat_large_in22k_in1k_224"),
                              ("dinat_large_384", "dinat_large_in22k_in1k_384"),
                              ("dinat_large_384_11x11", "dinat_large_in22k_in1k_384_11x11"),
                              ("dinat_s_large", "dinat_s_large_in1k_224"),
                              ("dinat_s_large_384", "dinat_s_large_in1k_384"))},
        **{name: Weights(f"{_DINAT}imagenet22k/{file}.pth", data="ImageNet-22K")
           for name, file in (("dinat_large_21k", "dinat_large_in22k_224"),
                              ("dinat_large_21k_11x11", "dinat_large_in22k_224_11x11interp"),
                              ("dinat_s_large_21k", "dinat_s_large_in22k_224"))},
        **{name: Weights(f"{_DINAT}isotropic/{name}_in1k_224.pth")
           for name in ("nat_isotropic_small", "nat_isotropic_base", "dinat_isotropic_small", "dinat_isotropic_base",
                        "vitrpb_small", "vitrpb_base")},
    },
    goldens=("nat_mini", "dinat_mini", "dinat_s_tiny", "op_neighborhood_attention", "op_neighborhood_attention_dilated",
             "op_neighborhood_attention_pad"),
    tests=("tests/papers/test_nat.py",),
)


class Neighborhood(nn.Module):
    """Attention of each token to its `kernel`^n nearest neighbours, `dilation` steps apart, with relative bias."""

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset, in the neighbourhood", "softmax", "sum of v")
    undecayed = ("bias",)

    def __init__(
        self, site: Site, kernel: int = 7, dilation: int = 1, qkv_bias: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.kernel, self.dilation = site.heads, kernel, dilation
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.bias = nn.Parameter(torch.zeros(site.heads, *[2 * kernel - 1] * site.rank)) if bias else None
        self.proj = nn.Linear(site.dim, site.dim)
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        missing = [larger(0, self.kernel * self.dilation - side) for side in grid]
        x = pad_end(x, missing)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out = neighborhood_attention(q, k, v, self.kernel, self.dilation, self.bias)
        return self.proj(crop(out.flatten(-2), grid))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The bias of another kernel, resampled (bicubic over the offsets), as the authors made their 11x11 models."""
        if self.bias is None or value.ndim != 3 or self.bias.ndim != 3:
            return value
        return F.interpolate(value[None], size=self.bias.shape[1:], mode="bicubic", align_corners=False)[0]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections (3 of them on the padded grid), 2 N k^n C for the products."""
        tokens = torch.Size(grid).numel()
        padded = torch.Size(max(side, self.kernel * self.dilation) for side in grid).numel()
        return (3 * padded + tokens) * site.dim**2 + 2 * padded * self.kernel**site.rank * site.dim

    def reach(self, site: Site) -> tuple[int, ...]:
        """A corner token sees kernel - 1 steps, one in the middle half of that."""
        return ((self.kernel - 1) * self.dilation,) * site.rank


class RelativeAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + b[j - i]) v) over all tokens: (B, *grid, C) -> (B, *grid, C).

    b has an entry a head and offset between two tokens of the native grid: (heads, *(2 side - 1)).
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset", "softmax", "sum of v")
    undecayed = ("bias",)

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.grid = site.heads, site.grid
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.bias = nn.Parameter(torch.empty(site.heads, *(2 * side - 1 for side in site.grid)))
        self.proj = nn.Linear(site.dim, site.dim)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend_at_offsets(q, k, v, at_grid(self.bias, grid), grid,
                                where=lambda: global_tokens(q.shape[-2], x.device))
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The bias of another native grid, resampled (bicubic over the offsets)."""
        return at_grid(value, self.grid) if value.ndim == self.bias.ndim else value

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products."""
        tokens = torch.Size(grid).numel()
        return 4 * tokens * site.dim**2 + 2 * tokens**2 * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def at_grid(bias: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A bias a head and offset, resampled to the offsets of a grid: (heads, *) -> (heads, *(2 side - 1))."""
    return resample(bias.movedim(0, -1)[None], tuple(2 * side - 1 for side in grid))[0].movedim(-1, 0)


class Tokenizer(nn.Module):
    """3x3 convolutions of stride 2, the first to half the width, then a norm: overlapping patches."""

    def __init__(self, rank: int, in_chans: int, dim: int, steps: int = 2) -> None:
        super().__init__()
        widths = [in_chans, *[dim // 2] * (steps - 1), dim]
        self.proj = nn.Sequential(*(
            CONVOLUTIONS[rank](before, after, 3, stride=2, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        ))
        self.norm = _LAYER_NORM(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).movedim(1, -1).contiguous())


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, then a norm."""

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = grid_conv(rank, dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm = _LAYER_NORM(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class NormedPatches(Isotropic):
    """An isotropic model whose patches are normed; the biases of its blocks tell where tokens stand."""

    def __init__(self, dim: int, *shape: int, patch: int, in_chans: int = 3, **options: Any) -> None:
        super().__init__(dim, *shape, patch=patch, norm=_LAYER_NORM, in_chans=in_chans, **options)
        self.stem = PatchEmbed(len(self.grid), in_chans, dim, stride=patch, norm=_LAYER_NORM)


def alternate(depths: Sequence[int], dilations: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The dilation of each block: 1 in even blocks, the stage's own in odd ones."""
    return tuple(tuple(step if index % 2 else 1 for index in range(depth))
                 for depth, step in zip(depths, dilations, strict=True))


def _table() -> dict[str, dict[str, Any]]:
    deep = (3, 4, 18, 5)
    sizes: dict[str, dict[str, Any]] = {
        "mini": dict(dim=64, depths=(3, 4, 6, 5), heads=2, mlp_ratio=3),
        "tiny": dict(dim=64, depths=deep, heads=2, mlp_ratio=3),
        "small": dict(dim=96, depths=deep, heads=3, mlp_ratio=2),
        "base": dict(dim=128, depths=deep, heads=4, mlp_ratio=2, layer_scale=1e-5),
        "large": dict(dim=192, depths=deep, heads=6, mlp_ratio=2),
    }
    swin: dict[str, dict[str, Any]] = {
        "tiny": dict(dim=96, depths=(2, 2, 6, 2), heads=3),
        "small": dict(dim=96, depths=(2, 2, 18, 2), heads=3),
        "base": dict(dim=128, depths=(2, 2, 18, 2), heads=4),
        "large": dict(dim=192, depths=(2, 2, 18, 2), heads=6),
    }
    table = {f"nat_{size}": dict(shape) for size, shape in sizes.items() if size != "large"}
    table["nat_small"]["layer_scale"] = 1e-5
    for prefix, shapes, own in (("dinat", sizes, {}), ("dinat_s", swin, {"builder": "dinat_s"})):
        for size, shape in shapes.items():
            table[f"{prefix}_{size}"] = shape | own | dict(dilations=alternate(shape["depths"], (8, 4, 2, 1)))
        large = shapes["large"] | own | dict(img_size=384)
        table[f"{prefix}_large_384"] = large | dict(dilations=alternate(shapes["large"]["depths"], (13, 6, 3, 1)))
    table["dinat_large_384_11x11"] = table["dinat_large"] | dict(kernel=11, img_size=384)
    for name in ("dinat_large", "dinat_s_large"):
        table[f"{name}_21k"] = table[name] | dict(num_classes=21841)
    table["dinat_large_21k_11x11"] = table["dinat_large_21k"] | dict(kernel=11)
    isotropic: dict[str, dict[str, Any]] = {
        "small": dict(dim=384, heads=12), "base": dict(dim=768, heads=24),
        "nano": dict(dim=64, heads=2, depth=4, kernel=3, patch=4, img_size=32),
    }
    for size, shape in isotropic.items():
        shape = dict(builder="isotropic") | shape
        table[f"nat_isotropic_{size}"] = shape
        table[f"dinat_isotropic_{size}"] = shape | dict(dilation=2)
        table[f"vitrpb_{size}"] = shape | dict(kernel=None)
    nano: dict[str, Any] = dict(dim=32, depths=(1, 2, 2), heads=1, mlp_ratio=4, kernel=3, steps=1, img_size=32)
    return table | {"nat_nano": nano, "dinat_nano": nano | dict(dilations=alternate((1, 2, 2), (4, 2, 1)))}


SIZES = _table()


def nat(
    dim: int,
    depths: Sequence[int],
    heads: int,
    mlp_ratio: float,
    dilations: Sequence[Sequence[int]] | None = None,
    kernel: int = 7,
    layer_scale: float | None = None,
    steps: int = 2,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A NAT, or with `dilations` (one a block) a DiNAT; width and heads double from stage to stage."""
    return _pyramid(
        dim, depths, heads, dilations, kernel, stem=partial(Tokenizer, steps=steps), downsample=Downsample,
        block=partial(Block, norm=_LAYER_NORM, mlp=partial(Mlp, ratio=mlp_ratio), layer_scale=layer_scale),
        stride=2**steps, replace=mixer, **common,
    )


def dinat_s(
    dim: int,
    depths: Sequence[int],
    heads: int,
    mlp_ratio: float = 4.0,
    dilations: Sequence[Sequence[int]] | None = None,
    kernel: int = 7,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """DiNAT in Swin's layout: patches of 4, patch merging."""
    return _pyramid(
        dim, depths, heads, dilations, kernel, stem=partial(PatchEmbed, norm=_LAYER_NORM), downsample=PatchMerging,
        block=partial(Block, norm=_LAYER_NORM, mlp=partial(Mlp, ratio=mlp_ratio)), replace=mixer, **common,
    )


def isotropic(
    dim: int,
    heads: int,
    depth: int = 12,
    dilation: int = 1,
    kernel: int | None = 7,
    patch: int = 16,
    mixer: Any = None,
    **common: Any,
) -> NormedPatches:
    """An isotropic NAT or DiNAT (`dilation` in odd blocks), or, without a `kernel`, ViT-rpb."""
    def built_in(site: Site) -> nn.Module:
        return Neighborhood(site, kernel, dilation if site.index % 2 else 1) if kernel else RelativeAttention(site)

    return NormedPatches(dim, depth, heads, patch=patch, mixer=built_in, replace=mixer, **common)


def _pyramid(
    dim: int, depths: Sequence[int], heads: int, dilations: Sequence[Sequence[int]] | None, kernel: int, **options: Any
) -> Pyramid:
    def mixer(site: Site) -> Neighborhood:
        return Neighborhood(site, kernel, 1 if dilations is None else dilations[site.stage][site.index])

    doubling = [2**stage for stage in range(len(depths))]
    return Pyramid([dim * times for times in doubling], depths, [heads * times for times in doubling],
                   mixer=mixer, norm=_LAYER_NORM, **options)


_PYRAMID: KeyMap = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    *((rf"(?:levels|layers)\.{stage}\.downsample\.(.*)", rf"stages.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"(?:levels|layers)\.(\d+)\.blocks\.(\d+)\.attn\.rpb", r"stages.\1.blocks.\2.mixer.bias"),
    (r"(?:levels|layers)\.(\d+)\.blocks\.(\d+)\.attn\.(.*)", r"stages.\1.blocks.\2.mixer.\3"),
    (r"(?:levels|layers)\.(\d+)\.blocks\.(\d+)\.gamma(\d)", r"stages.\1.blocks.\2.scale\3.0.gamma"),
    (r"(?:levels|layers)\.(\d+)\.(.*)", r"stages.\1.\2"),
    (r"head\.(.*)", r"head.fc.\1"),
)
_ISOTROPIC: KeyMap = (
    Dropped(r"layers\.\d+\.attn\.relative_position_index", "derived buffer"),
    (r"patch_embed\.(.*)", r"stem.\1"),
    (r"layers\.(\d+)\.attn\.rpb", r"blocks.\1.mixer.bias"),
    (r"layers\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
    (r"layers\.(\d+)\.(.*)", r"blocks.\1.\2"),
)


def AUTHORS(name: str) -> KeyMap:
    """The authors' names in a model."""
    return _ISOTROPIC if SIZES[name].get("builder") == "isotropic" else _PYRAMID


# The authors' stage outputs are taken after the downsampling that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
