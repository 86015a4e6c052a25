"""VSA: every window of every head learns where, and how large, the window of its keys is.

Queries stay in windows of M x M. From the mean of a window each head draws a scale and an offset of that window, and
keys and values are read (bilinearly) where the moved and stretched window lies,
    out = softmax(q k'^T / sqrt(d) + B) v',   k', v' = (k, v) at  place + scale * (place - centre) + offset,
so that zero keeps the window as it is. ViTAEv2 carries it: reduction cells of dilated convolutions, normal cells, and
beside each attention a branch of convolutions. In Swin such windows take the place of fixed and shifted ones, behind a
convolutional position term.

Zhang, Xu, Zhang, Tao, "VSA: Learning Varied-Size Window Attention in Vision Transformers", 2022, section 3.
Zhang, Xu, Zhang, Tao, "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias", 2022, section 3.

Any grid: padded with zeros at its end, q, k and v after qkv; padded tokens are not masked. Quirks kept: an offset
counts in whole windows of the unpadded grid; the logits' scale follows the width before the projections; the last map
has no norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, Rule, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.sizes import larger
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.attention import check_heads
from saccade.parts.block import Block, residual_tail
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.mlp import Mlp
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import pad_image
from saccade.parts.swin_pyramid import SwinPyramid
from saccade.parts.window import RelativeBias

CARD = Card(
    "VSA: Learning Varied-Size Window Attention in Vision Transformers",
    authors="Zhang, Xu, Zhang, Tao",
    year=2022,
    systems=("vsa",),
    arxiv="2204.08446, 2202.10108",
    code="ViTAE-Transformer/ViTAE-VSA@75dc986",
    read="paper",
    keywords="varied-size window attention, window regression, moving windows, ViTAEv2, reduction cell, normal cell",
    kinds=("backbone", "mixer"),
    mixers={"varied_size_window": "VariedSizeWindow"},
    params={"vitaev2_vsa_s": 19.8e6, "swin_tiny_vsa": 29e6},
    macs={"swin_tiny_vsa": 4.6e9},
    top1={"vitaev2_vsa_s": 82.7, "swin_tiny_vsa": 82.2, "swin_small_vsa": 83.6},
    weights={"vitaev2_vsa_s": Weights("https://1drv.ms/u/s!AimBgYV7JjTlgcgB0Xlyc3U4WO11AQ?e=AGRBDl")},
    goldens=("vitaev2_vsa_s", "op_varied_size_window_attention", "op_varied_size_window_attention_pad"),
)

Grid = tuple[int, ...]


class VariedSizeWindow(nn.Module):
    """Window attention to keys of moved and stretched windows: (B, *grid, C) -> (B, *grid, out_dim)."""

    ranks, weights = (2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) + offset, to windows moved and stretched by the content", "softmax", "sum of v, sampled"
    )

    def __init__(self, site: Site, window: int = 7, out_dim: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        width = out_dim or site.dim
        self.heads, self.window = site.heads, (window,) * site.rank
        self.scale = (site.dim // site.heads) ** -0.5
        self.offsets = nn.Linear(site.dim, site.heads * site.rank)
        self.scales = nn.Linear(site.dim, site.heads * site.rank)
        self.qkv = nn.Linear(site.dim, 3 * width, bias=qkv_bias)
        self.bias = RelativeBias(self.window, site.heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, kv = pad_to_multiple(self.qkv(x), self.window).tensor_split((self.proj.in_features,), -1)
        padded = tuple(q.shape[1:-1])
        kv = laid_out(kv.unflatten(-1, (2, self.heads, -1)).movedim(-2, 1)).flatten(-2).flatten(0, 1)
        read = F.grid_sample(kv.movedim(-1, 1), self.places(x, padded), align_corners=True).movedim(1, -1)
        keys = partition(read, self.window).unflatten(0, (x.shape[0], self.heads, -1)).transpose(1, 2)
        k, v = laid_out(keys).flatten(0, 1).chunk(2, -1)  # (B G, heads, N, d)
        q = partition(q, self.window).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attend(q, k, v, self.bias(), scale=self.scale).transpose(1, 2).flatten(2)
        return self.proj(crop(merge(out, self.window, padded), grid))

    def places(self, x: Tensor, padded: Grid) -> Tensor:
        """(B h, *padded, rank) where each head reads the key of each place, in [-1, 1], the last axis first."""
        rank, grid = len(padded), tuple(x.shape[1:-1])
        windows = partition(pad_to_multiple(x, self.window), self.window).mean(1)
        sides = [side // part for side, part in zip(padded, self.window, strict=True)]
        windows = F.leaky_relu(windows.view(x.shape[0], *sides, -1))
        counts = torch.stack([torch.full((), larger(side // part, 1), dtype=x.dtype, device=x.device)
                              for side, part in zip(reversed(grid), reversed(self.window), strict=True)])
        moved, stretched = (
            laid_out(layer(windows).unflatten(-1, (self.heads, rank)).movedim(-2, 1)).flatten(0, 1)
            for layer in (self.offsets, self.scales)
        )
        place, inside = window_places(padded, self.window, x.dtype, x.device)
        for axis, (side, part) in enumerate(zip(padded, self.window, strict=True), 1):
            own = torch.arange(side, device=x.device) // part  # repeat_interleave would ask export what the product is
            moved, stretched = (value.index_select(axis, own) for value in (moved, stretched))
        return (place + inside * stretched + moved / counts).to(x.dtype)

    def reach(self, site: Site) -> None:
        """A window may move anywhere."""
        return None

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds of N tokens in W windows of the padded grid of P: projections N (3 C + out) out, attention
        2 P |window| out, offsets and scales 2 W C heads rank; reading between tokens is not counted.
        """
        padded = prod(side + (-side) % part for side, part in zip(grid, self.window, strict=True))
        width, dim = self.proj.in_features, self.qkv.in_features
        regression = 2 * padded // prod(self.window) * dim * self.heads * len(grid)
        return prod(grid) * (3 * dim + width) * width + 2 * padded * prod(self.window) * width + regression


def laid_out(x: Tensor) -> Tensor:
    """A copy in its own order: flattening it then bakes in no size (see `ops.window.partition`)."""
    return x.clone(memory_format=torch.contiguous_format)


@table
def window_places(padded: Grid, window: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(*padded, rank) each place in [-1, 1], and what it is from the centre of its window; the last axis first."""
    places: list[Tensor] = []
    inside: list[Tensor] = []
    for side, part in zip(padded, window, strict=True):
        step = 2 / larger(side - 1, 1)
        place = torch.arange(side, dtype=dtype, device=device)
        places.append(place * step - 1)
        inside.append((place.remainder(part) - (part - 1) / 2) * step)
    grids = [torch.stack(list(reversed(torch.meshgrid(axes, indexing="ij"))), -1) for axes in (places, inside)]
    return grids[0], grids[1]


class Pyramidal(nn.Module):
    """Dilated convolutions of one stride, joined after their GELU: (B, *grid, C) -> (B, *grid / stride, n dim)."""

    def __init__(self, rank: int, dim: int, out_dim: int, kernel: int, stride: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            grid_conv(rank, dim, out_dim, kernel, stride=stride, dilation=dilation,
                      padding=ceil(((kernel - 1) * dilation + 1 - stride) / 2))
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.gelu(conv(x)) for conv in self.convs], -1)


def convolutions(rank: int, widths: Sequence[int], strides: Sequence[int], groups: Sequence[int]) -> nn.Sequential:
    """The branch beside attention: three 3x3 convolutions, norm and SiLU between them."""
    first, second, third = (
        conv_norm(rank, dim, out_dim, 3, stride, group, bias=True)
        for dim, out_dim, stride, group in zip(widths, widths[1:], strides, groups, strict=False)
    )
    return nn.Sequential(*first, nn.SiLU(), *second, nn.SiLU(), third[0])


class ReductionCell(nn.Module):
    """y = dilated(x); y = attention(norm(y + conv(y))) + convolutions(x); y += mlp(norm(y)): a map at a coarser stride.

    It pads the end of the map to a multiple of its stride. `image` says that it is given (B, C, *size).
    """

    def __init__(
        self, rank: int, dim: int, out_dim: int, *, heads: int, hidden: int, dilations: Sequence[int], groups: int,
        kernel: int = 3, stride: int = 2, window: int = 7, image: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.image = stride, image
        self.pyramid = Pyramidal(rank, dim, hidden, kernel, stride, dilations)
        width = hidden * len(dilations)
        self.norm1 = nn.LayerNorm(width)
        self.position = depthwise(rank, width, 7)
        self.attention = VariedSizeWindow(Site(width, heads, grid=(window,) * rank), window, out_dim)
        strides = [2 if stride >= 2**step else 1 for step in (1, 2, 3)]
        self.local = convolutions(rank, (dim, hidden, hidden, out_dim), strides, (groups,) * 3)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = Mlp(out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            x = pad_image(x, self.stride).movedim(1, -1).contiguous()
        else:
            x = pad_to_multiple(x, (self.stride,) * (x.ndim - 2))
        y = self.pyramid(x)
        y = self.attention(self.norm1(y + self.position(y))) + self.local(x)
        return y + self.mlp(self.norm2(y))


class NormalCell(nn.Module):
    """x += attention(norm(x + conv(x))) + convolutions(x); x += mlp(norm(x))."""

    def __init__(self, site: Site, mixer: nn.Module, groups: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.site = site
        self.norm1 = nn.LayerNorm(site.dim)
        self.position = depthwise(site.rank, site.dim, 7)
        self.mixer = mixer
        widths = (site.dim, 4 * site.dim, site.dim, site.dim)
        self.local = convolutions(site.rank, widths, (1, 1, 1), (groups,) * 3)
        self.norm2 = nn.LayerNorm(site.dim)
        self.mlp = Mlp(site.dim)
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm1(x + self.position(x)))
        x = x + self.tail(mixed) + self.tail(self.local(x))
        return x + self.tail(self.mlp(self.norm2(x)))


SIZES: dict[str, dict[str, Any]] = {
    "vitaev2_vsa_s": dict(
        dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), heads=(2, 4, 8, 16), merging_heads=(2, 2, 4, 8),
        dilations=((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2)), groups=(1, 32, 64, 128), merging_groups=(1, 16, 32, 64)),
    "vsa_nano": dict(
        dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), merging_heads=(1, 1, 2), patch=2, window=4, img_size=32,
        dilations=((1, 2), (1, 2), (1, 2)), groups=(1, 16, 32), merging_groups=(1, 8, 16)),
    "swin_tiny_vsa": dict(builder="swin_vsa", dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_small_vsa": dict(builder="swin_vsa", dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "swin_vsa_nano": dict(builder="swin_vsa", dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), window=4, patch=2,
                          img_size=32),
}


def vsa(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    merging_heads: Sequence[int],
    dilations: Sequence[Sequence[int]],
    groups: Sequence[int],
    merging_groups: Sequence[int],
    patch: int = 4,
    window: int = 7,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A ViTAEv2 with varied-size windows; a stage is its reduction cell and `depth` normal cells."""
    cells = [
        partial(ReductionCell, heads=merging_heads[stage], hidden=dims[max(stage - 1, 0)], dilations=dilations[stage],
                groups=merging_groups[stage], window=window)
        for stage in range(len(dims))
    ]

    def block(site: Site, mixer: nn.Module, drop_path: float) -> NormalCell:
        return NormalCell(site, mixer, groups[site.stage], drop_path)

    return Pyramid(
        dims, depths, heads, stem=partial(cells[0], kernel=7 if patch == 4 else 3, stride=patch, image=True),
        stride=patch, downsample=cells[1:], block=block, mixer=partial(VariedSizeWindow, window=window),
        replace=mixer, **common,
    )


def swin_vsa(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], window: int = 7, patch: int = 4,
    mixer: Any = None, **common: Any,
) -> SwinPyramid:
    """A Swin of varied-size windows: none of them shifts, and a convolution adds the position before each."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return Block(site, mixer, norm=nn.LayerNorm, position=depthwise(site.rank, site.dim, 7), drop_path=drop_path)

    windows = partial(VariedSizeWindow, window=window)
    return SwinPyramid(dims, depths, heads, patch, block=block, mixer=windows, replace=mixer, **common)


MIXER: tuple[Rule, ...] = (
    Dropped("relative_position_index", "derived buffer"),
    ("relative_position_bias_table", "bias.table"),
    (r"sampling_(offsets|scales)\.2\.weight", r"\1.weight", matrix_from_1x1),
    (r"sampling_(offsets|scales)\.2\.bias", r"\1.bias"),
    (r"(qkv|proj)\.weight", r"\1.weight", matrix_from_1x1),
    (r"(.*)", r"\1"),
)


def _cell(attention: str) -> tuple[Rule, ...]:
    return (
        *within(MIXER, r"attn\.", f"{attention}."),
        (r"PCM\.(.*)", r"local.\1"),
        (r"PRM\.convs\.(\d+)\.0\.(.*)", r"pyramid.convs.\1.\2"),
        (r"pos\.(.*)", r"position.\1"),
        (r"(.*)", r"\1"),
    )


AUTHORS: KeyMap = (
    *within(_cell("attention"), r"layers\.0\.RC\.", "stem."),
    *within(_cell("attention"), r"layers\.(\d+)\.RC\.", r"stages.\1.downsample."),
    *within(_cell("mixer"), r"layers\.(\d+)\.NC\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
