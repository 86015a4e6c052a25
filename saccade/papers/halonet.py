"""HaloNet: attention of blocks of queries to the block and a halo around it.

The map is cut into blocks of b x b tokens; all queries of a block share one window of (b + 2h)^2 keys, the block and h
tokens around it, so that windows are fetched once a block and not once a token:
    out_i = sum_{j in window(block of i)} softmax_j(q_i . k_j / sqrt(d) + q_i . (r_y[j_y - i_y] + r_x[j_x - i_x])) v_j,
with a learned vector r an offset on each axis. It takes the place of the 3x3 convolution of a ResNet's bottleneck; to
downsample, a block asks with every second token alone. There is no output projection: the bottleneck's 1x1 is one.

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens, "Scaling Local Self-Attention for Parameter Efficient Visual
Backbones", 2021, sections 2 and 3.

Any grid: the last block of an axis may be cut short; keys more than a halo beyond the map are masked.
Quirks kept (timm's, the authors' code was never released): keys in the halo outside the map are zeros and not masked;
offsets count from the corner of the window, not from the query's place in it; halonet_h1 has 8 heads in its first stage
where the paper's family has 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.record import Where
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.ops.attend import attend, in_cache
from saccade.ops.sizes import modulo
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_end, partition
from saccade.parts.attention import check_heads
from saccade.parts.convolution import AveragePool, conv_norm
from saccade.parts.head import head_on
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.resnet import (
    RELU,
    Activation,
    Bottleneck,
    Convolution,
    MaxPool,
    each,
    kaiming,
    resnet_pyramid,
    resnet_stem,
)
from saccade.parts.squeeze import SqueezeExcite, divisible
from saccade.parts.stem import ConvStem

_ADDRESS = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/"

CARD = Card(
    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    authors="Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens",
    year=2021,
    systems=("halonet",),
    arxiv="2103.12731",
    code="huggingface/pytorch-image-models (timm 1.0.31)",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="halo attention, blocked local attention, haloing, relative position, attention downsampling",
    kinds=("backbone", "mixer"),
    mixers={"halo_attention": "HaloAttention"},
    params={"halonet_h0": 5.5e6, "halonet_h1": 8.1e6, "halonet_h2": 9.4e6, "halonet_h3": 11.8e6, "halonet_h4": 19.1e6,
            "halonet_h5": 30.7e6, "halonet_h6": 43.4e6, "halonet_h7": 67.4e6, "halonet26t": 12480288,
            "halonet50ts": 22733280, "sehalonet33ts": 13691712},
    top1={"halonet_h0": 77.9, "halonet_h1": 79.9, "halonet_h2": 80.4, "halonet_h3": 81.9, "halonet_h4": 83.3,
          "halonet_h5": 84.0, "halonet_h6": 84.4, "halonet_h7": 84.9},
    weights={
        name: Weights(f"{_ADDRESS}{file}.pth", crop=crop, top1=top1, licence="Apache-2.0")
        for name, file, crop, top1 in (
            ("halonet26t", "halonet26t_a1h_256-3083328c", 0.95, 79.1),
            ("sehalonet33ts", "sehalonet33ts_256-87e053f9", 0.94, 81.0),
            ("halonet50ts", "halonet50ts_a1h2_256-f3a3daee", 0.94, 81.6),
        )
    },
    goldens=("halonet26t", "op_halo_attention", "op_halo_attention_small", "op_halo_attention_stride"),
    tests=("tests/papers/test_halonet.py",),
)


PAIRS = 2**19  # of queries and keys, whose position terms are laid out at once in evaluation


def key_places(grid: tuple[int, ...], block: int, halo: int, device: torch.device) -> list[Tensor]:
    """For each axis (blocks, window): the place of each block's keys on it, some before its start or behind its end."""
    counts = [(size + block - 1) // block for size in grid]
    number, keys = torch.arange(prod(counts), device=device)[:, None], torch.arange(block + 2 * halo, device=device)
    places = []
    for count in reversed(counts):
        places.append(modulo(number, count) * block - halo + keys)
        number = number // count
    return places[::-1]


@table
def halo_tokens(grid: tuple[int, ...], block: int, halo: int, device: torch.device) -> Tensor:
    """(blocks, keys) number of the token at each place of each block's window, -1 outside the map."""
    first, *others = zip(grid, key_places(grid, block, halo, device), strict=True)
    number, inside = first[1], (first[1] >= 0) & (first[1] < first[0])
    for size, place in others:
        number = (number[:, :, None] * size + place[:, None]).flatten(1)
        inside = (inside[:, :, None] & ((place >= 0) & (place < size))[:, None]).flatten(1)
    return number.masked_fill(~inside, -1)


@table
def beyond_halo(
    grid: tuple[int, ...], block: int, halo: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """For each axis (blocks, window): -inf where a key lies more than a halo behind the map's end, else 0."""
    places = zip(grid, key_places(grid, block, halo, device), strict=True)
    return tuple(torch.zeros(place.shape, dtype=dtype, device=device).masked_fill(place >= size + halo, -torch.inf)
                 for size, place in places)


class HaloAttention(nn.Module):
    """Attention of each block's queries to the block and its halo: (B, *grid, C) -> (B, *ceil(grid / stride), C').

    `key_dim` is the width of a head's queries and keys, C' / heads unless told. With a stride, every second token asks;
    or, where `pool` is set or the stride does not divide the block, all do and the outputs are averaged. `scaled`
    divides the position term by sqrt(key_dim) too.
    """

    ranks, weights = (1, 2, 3), True
    template = Template("q k^T / sqrt(d) + q r[j - i], in block and halo", "softmax", "sum of v")
    undecayed = ("offsets",)

    def __init__(
        self,
        site: Site,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        out_dim: int | None = None,
        key_dim: int | None = None,
        qkv_bias: bool = False,
        pool: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        value_dim = check_heads(replace(site, dim=out_dim or site.dim))
        self.heads, self.block, self.halo, self.scaled = site.heads, block, halo, scaled
        self.window = block + 2 * halo
        self.key_dim, self.value_dim = key_dim or value_dim, value_dim
        if stride not in (1, 2):
            raise SaccadeError(f"stride={stride}: halo attention downsamples by 2, or not (1)")
        merged = stride > 1 and (pool or block % stride)
        # The mean of the 2x2 tokens, of those there are at an odd end.
        self.pool = AveragePool(2, 2, ceil_mode=True, count_include_pad=False) if merged else None
        self.stride = 1 if self.pool is not None else stride
        self.q = nn.Linear(site.dim, site.heads * self.key_dim, bias=qkv_bias)
        self.kv = nn.Linear(site.dim, site.heads * (self.key_dim + value_dim), bias=qkv_bias)
        # The vectors of the first axis, then those of the next.
        self.offsets = nn.Parameter(torch.empty(site.rank * (2 * self.window - 1), self.key_dim))
        for weight, fan in ((self.q.weight, site.dim), (self.kv.weight, site.dim), (self.offsets, self.key_dim)):
            nn.init.trunc_normal_(weight, std=fan**-0.5)

    def position(self, q: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """q_i . sum over the axes of r[j - i]: q (B, blocks, h, queries, d) -> (B, blocks, h, queries, keys).

        `masks` (blocks, window), one an axis, are added where there are some.
        """
        rank, window = self.offsets.shape[0] // (2 * self.window - 1), self.window
        logits = (q @ self.offsets.T).unflatten(3, (self.block // self.stride,) * rank)
        if self.scaled:
            logits = logits * self.key_dim**-0.5
        total: Any = 0
        for axis, part in enumerate(logits.chunk(rank, -1)):
            rows = enumerate(part.unbind(3 + axis))  # the query's place in its block says which offsets its keys have
            part = torch.stack([row.narrow(-1, window - 1 - place, window) for place, row in rows], 3 + axis)
            if masks:
                part = part + masks[axis].view(-1, *[1] * (rank + 1), window)
            keys = [window if other == axis else 1 for other in range(rank)]
            total = total + part.flatten(3, 2 + rank).unflatten(-1, keys)
        return total.flatten(4)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        rank, side = len(grid), self.block // self.stride
        asking = x[(slice(None), *[slice(None, None, self.stride)] * rank)] if self.stride > 1 else x
        asked = tuple(asking.shape[1:-1])
        full = tuple((size + self.block - 1) // self.block * side for size in grid)
        q = pad_end(self.q(asking), [size - part for size, part in zip(full, asked, strict=True)])
        q = partition(q, (side,) * rank).unflatten(0, (x.shape[0], -1)).unflatten(-1, (self.heads, -1)).transpose(2, 3)

        tokens = halo_tokens(tuple(grid), self.block, self.halo, x.device)
        kv = F.pad(self.kv(x).flatten(1, -2), [0, 0, 1, 0])  # the zeros outside the map stand first
        cut = not all(isinstance(size, int) and size % self.block == 0 for size in grid)
        masks = beyond_halo(tuple(grid), self.block, self.halo, q.dtype, x.device) if cut else ()

        def where() -> tuple[Tensor, Tensor]:
            number = torch.arange(1, prod(grid) + 1, device=x.device).view(1, *grid, 1)
            number = number[(slice(None), *[slice(None, None, self.stride)] * rank)]
            number = pad_end(number, [size - part for size, part in zip(full, asked, strict=True)])
            return partition(number, (side,) * rank).squeeze(-1) - 1, tokens

        if in_cache(q):
            some = PAIRS // (q.shape[0] * prod(q.shape[2:4]) * tokens.shape[1]) or 1
            parts = zip(q.split(some, 1), tokens.split(some), *(mask.split(some) for mask in masks), strict=True)
            out = torch.cat([self.look(q, kv, tokens, masks) for q, tokens, *masks in parts], 1)
        else:
            out = self.look(q, kv, tokens, masks, where)
        out = crop(merge(out.flatten(0, 1), (side,) * rank, full), asked)
        return out if self.pool is None else self.pool(out)

    def look(
        self, q: Tensor, kv: Tensor, tokens: Tensor, masks: Sequence[Tensor], where: Where | None = None
    ) -> Tensor:
        """Queries (B, blocks, h, queries, d) of blocks whose keys are `tokens` (blocks, keys) of kv (B, 1 + N, C)."""
        near = kv.index_select(1, tokens.flatten() + 1).unflatten(1, tokens.shape).unflatten(-1, (self.heads, -1))
        k, v = near.flatten(0, 1).transpose(1, 2).split([self.key_dim, self.value_dim], -1)
        out = attend(q.flatten(0, 1), k, v, self.position(q, masks).flatten(0, 1), where=where)
        return out.transpose(1, 2).flatten(2).unflatten(0, q.shape[:2])

    def cost(self, site: Site | None, grid: tuple[int, ...]) -> int:
        """Multiply-adds: projections of N tokens, and for each of M queries (of the padded grid) the products with
        W keys of a window and with the offsets of each axis.
        """
        tokens = prod(grid)
        asking = prod(-(-size // self.stride) for size in grid)
        queries = prod(-(-size // self.block) * self.block // self.stride for size in grid)
        keys, both = self.heads * self.key_dim, self.heads * (self.key_dim + self.value_dim)
        products = self.window ** len(grid) * both + len(grid) * (2 * self.window - 1) * keys
        return (asking * keys + tokens * both) * self.q.in_features + queries * products

    def reach(self, site: Site) -> tuple[int, ...]:
        """From one end of a block over the other to the end of the halo."""
        return (self.block + self.halo - 1,) * site.rank


def halo_block(site: Site, mixer: nn.Module, *, values: int, squeeze: bool, **place: Any) -> Bottleneck:
    """A bottleneck whose mixer gives `values` channels; where they are not the site's, no other can be swapped in.

    `squeeze` puts squeeze and excitation behind a convolution.
    """
    block = Bottleneck(site, mixer, **place)
    if values != site.dim:
        block.site, block.norm2 = None, BatchNorm(values)
        block.conv3 = kaiming(nn.Linear(values, place["out_dim"], bias=False))
    if squeeze and isinstance(mixer, Convolution):
        block.activation2 = nn.Sequential(block.activation2, SqueezeExcite(site.dim, divisible(site.dim / 16)))
    return block


def tiered_stem(rank: int, in_chans: int, dim: int, activation: Activation, pool: bool) -> ConvStem:
    """Three 3x3 convolutions of growing width, then pooling, or the last of them with a stride."""
    widths, layers = [in_chans, 3 * dim // 8, dim // 2, dim], []
    for before, after, stride in zip(widths, widths[1:], (2, 1, 1 if pool else 2), strict=False):
        layers += [*conv_norm(rank, before, after, stride=stride), activation()]
    return ConvStem(*layers, *([MaxPool(rank)] if pool else []))


_ALL = (range(3), range(3), range(26), range(3))
_HEADS = (4, 8, 8, 8)
_SILU = partial(nn.SiLU, inplace=True)
SIZES: dict[str, dict[str, Any]] = {
    f"halonet_h{number}": dict(
        dims=[int(expansion * width) for width in (64, 128, 256, 512)], depths=(3, 3, depth, 3), attention=_ALL,
        values=values, block=block, halo=halo, heads=_HEADS, projection=projection, tiered=False, img_size=side)
    for number, (block, halo, values, expansion, depth, projection, side) in enumerate((
        (8, 3, 1, 0.5, 7, None, 256), (8, 3, 1, 1, 10, None, 256), (8, 3, 1, 1.25, 11, None, 256),
        (10, 3, 1, 1.5, 12, 1024, 320), (12, 2, 1, 3, 12, 1280, 384), (14, 2, 2.5, 2, 23, 1536, 448),
        (8, 4, 3, 2.75, 24, 1536, 512), (10, 3, 4, 3.5, 26, 2048, 600)))
}
SIZES["halonet_h1"]["heads"] = (8, 8, 8, 8)
SIZES |= {
    "halonet26t": dict(dims=(256, 512, 1024, 2048), depths=(2, 2, 2, 2), attention=((), (), (1,), (0, 1)), halo=2,
                       img_size=256),
    "halonet50ts": dict(dims=(256, 512, 1024, 2048), depths=(3, 4, 6, 3), attention=((), (3,), (1, 3, 5), (1,)),
                        heads=(8, 4, 8, 8), activation=_SILU, img_size=256),
    "sehalonet33ts": dict(dims=(256, 512, 1024, 1536), depths=(2, 3, 3, 2), attention=((), (2,), (2,), (0, 1)),
                          activation=_SILU, squeeze=True, pool=False, projection=1280, img_size=256),
    "halonet_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), attention=((), (0, 1), (1,)), widths=(16, 16, 32),
                         heads=(1, 2, 2), block=4, halo=1, strides=(1, 2, 1), squeeze=True, projection=48, img_size=32),
}


def halonet(
    dims: Sequence[int],
    depths: Sequence[int],
    attention: Sequence[Sequence[int]],
    widths: Sequence[int] = (64, 128, 256, 512),
    values: float = 1.0,
    block: int = 8,
    halo: int = 3,
    heads: Sequence[int] = (8, 8, 8, 8),
    strides: Sequence[int] = (1, 2, 2, 2),
    activation: Activation = RELU,
    squeeze: bool = False,
    tiered: bool = True,
    pool: bool = True,
    projection: int | None = None,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A HaloNet of a size: a ResNet of maps of `dims` channels, whose mixers see `widths` and give `values` times that.

    `attention` numbers the blocks of each stage that attend, the others convolve. `tiered`, and without `pool`: the
    stem. `projection` widens the last map before it is pooled, so that is what `forward_features` gives.
    """

    def wide(site: Site) -> int:
        return int(values * site.dim) if site.index in attention[site.stage] else site.dim

    def own(site: Site, stride: int = 1) -> nn.Module:
        if site.index in attention[site.stage]:
            return HaloAttention(site, block, halo, stride, out_dim=wide(site), key_dim=site.dim // site.heads)
        return Convolution(site, stride=stride)

    def widened(factory: MixerFactory, site: Site) -> nn.Module:
        other = factory(site)
        return other if wide(site) == site.dim else nn.Sequential(other, nn.Linear(site.dim, wide(site), bias=False))

    def stem(rank: int, in_chans: int, dim: int) -> nn.Module:
        if tiered:
            return tiered_stem(rank, in_chans, dim, activation, pool)
        return resnet_stem(rank, in_chans, dim, activation)

    def bottleneck(site: Site, mixer: nn.Module, **place: Any) -> nn.Module:
        return halo_block(site, mixer, values=wide(site), squeeze=squeeze, activation=activation, **place)

    last = projection or dims[-1]
    model = resnet_pyramid(
        dims, depths, widths=widths[:len(dims)], block=bottleneck, mixer=own, reduction=partial(own, stride=2),
        stem=stem, strides=strides, heads=heads, replace=None if mixer is None else each(mixer, widened),
        norm=None if projection is None else lambda dim: nn.Sequential(
            nn.Linear(dim, last, bias=False), BatchNorm(last), activation()),
        head=partial(head_on, last), **common,
    )
    model.num_features = last
    return model


ATTENTION: KeyMap = (
    (r"(q|kv)\.(.*)", r"\1.\2", pointwise),
    (r"pos_embed\.height_rel", "offsets#0"),
    (r"pos_embed\.width_rel", "offsets#1"),
)
BLOCK: KeyMap = (
    *within(ATTENTION, r"self_attn\.", "mixer."),
    (r"post_attn\.(.*)", r"norm2.\1"),
    (r"conv2_kxk\.conv\.(.*)", r"mixer.conv.\1"),
    (r"conv2_kxk\.bn\.(.*)", r"norm2.\1"),
    (r"conv([13])_1x1\.conv\.(.*)", r"conv\1.\2", pointwise),
    (r"conv([13])_1x1\.bn\.(.*)", r"norm\1.\2"),
    (r"attn\.(.*)", r"activation2.1.\1", pointwise),
    (r"shortcut\.conv\.(.*)", r"shortcut.0.\1"),
    (r"shortcut\.bn\.(.*)", r"shortcut.1.\1"),
)
# The names of timm, whose HaloNets are the only ones with weights.
AUTHORS: KeyMap = (
    *(rule for number in (1, 2, 3) for rule in (
        (rf"stem\.conv{number}\.conv\.(.*)", rf"stem.{3 * number - 3}.\1"),
        (rf"stem\.conv{number}\.bn\.(.*)", rf"stem.{3 * number - 2}.\1"))),
    *within(BLOCK, r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"final_conv\.conv\.(.*)", r"norm.0.\1", pointwise),
    (r"final_conv\.bn\.(.*)", r"norm.1.\1"),
)
TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
