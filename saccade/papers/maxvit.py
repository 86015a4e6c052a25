"""MaxViT: attention in blocks, then attention in a grid spread over the whole map.

A map of H x W tokens is cut twice into groups of P x P: into windows of neighbours (block attention), and into the
tokens that lie H/P and W/P apart (grid attention), so that two attentions of linear cost join every token to every
other:
    block: (H/P, P, W/P, P, C) -> attend over both P;   grid: (P, H/P, P, W/P, C) -> attend over both P,
with a learned bias a relative offset. Before each pair stands an inverted residual (MBConv) with squeeze and
excitation, which downsamples where a stage begins. Here a MaxViT block is two blocks of one mixer each, so that either
attention can be replaced: even ones hold MBConv and block attention, odd ones grid attention.

Tu et al., "MaxViT: Multi-Axis Vision Transformer", 2022, section 3.

Any grid: one that is no multiple of P is zero-padded at its end, before qkv; padded tokens are masked.
Quirks kept: TensorFlow's asymmetric padding, batch norms of eps 1e-3, layer norms of eps 1e-5, GELU's tanh form; P is
img_size/32 where 7 does not divide the native grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import HALF, Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_end, pad_to_multiple, partition
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.head import Head
from saccade.parts.mbconv import MBConv, SameConv
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.window import RelativeBias

_SIZES = ("tiny", "small", "base", "large")
_SIDES = (224, 384, 512)

CARD = Card(
    "MaxViT: Multi-Axis Vision Transformer",
    authors="Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li",
    year=2022,
    systems=("maxvit",),
    arxiv="2204.01697",
    code="google-research/maxvit@70a4707",
    licence="Apache-2.0",
    read="paper, code",
    keywords="multi-axis attention, block attention, grid attention, dilated global attention, MBConv, max-sa",
    kinds=("backbone", "mixer"),
    mixers={"block_attention": "BlockAttention", "grid_attention": "GridAttention"},
    params={"maxvit_tiny_tf": 31e6, "maxvit_small_tf": 69e6, "maxvit_base_tf": 119e6, "maxvit_large_tf": 212e6,
            "maxvit_xlarge_tf": 475e6},
    macs=dict(zip(
        (*(f"maxvit_{size}_tf{side}" for size in _SIZES for side in ("", "_384", "_512")), "maxvit_xlarge_tf"),
        (5.6e9, 17.7e9, 33.7e9, 11.7e9, 36.1e9, 67.6e9, 24.2e9, 74.2e9, 138.5e9, 43.9e9, 133.1e9, 245.4e9, 97.8e9),
        strict=True)),
    top1=dict(zip(
        (f"maxvit_{size}_tf{side}" for size in _SIZES for side in ("", "_384", "_512")),
        (83.62, 85.24, 85.72, 84.45, 85.74, 86.19, 84.95, 86.34, 86.66, 85.17, 86.40, 86.70), strict=True)),
    aliases={f"maxvit_{size}_tf_224": f"maxvit_{size}_tf" for size in (*_SIZES, "xlarge")},
    weights={  # the authors' are TensorFlow's
        f"maxvit_{size}_tf{side}": Weights(f"timm:maxvit_{size}_tf{side or '_224'}.in1k", licence="Apache-2.0",
                                           **({"mean": HALF, "std": HALF, "crop": 1.0} if side else {"crop": 0.95}))
        for size in _SIZES for side in ("", "_384", "_512")
    } | {
        f"maxvit_xlarge_tf_{side}": Weights(
            f"timm:maxvit_xlarge_tf_{side}.in21k_ft_in1k", data="ImageNet-21K, ImageNet-1K", mean=HALF, std=HALF,
            crop=1.0, top1=top1, licence="Apache-2.0")
        for side, top1 in ((384, 88.3), (512, 88.5))
    },
    goldens=("maxvit_tiny_tf", "op_maxvit_block_attention", "op_maxvit_grid_attention"),
)

Cut = Callable[[Tensor, tuple[int, ...]], Tensor]


def spread(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) -> (B x groups, prod(window), C): a group holds tokens grid/window apart, over the whole grid."""
    rank = len(window)
    sides = [side for size, part in zip(x.shape[1:-1], window, strict=True) for side in (part, size // part)]
    order = [0, *range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2), 2 * rank + 1]
    x = x.view(x.shape[0], *sides, x.shape[-1]).permute(order)
    return x.clone(memory_format=torch.contiguous_format).flatten(rank + 1, 2 * rank).flatten(0, rank)


def gather(windows: Tensor, window: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Undo `spread`: (B x groups, prod(window), C) -> (B, *grid, C)."""
    rank = len(window)
    counts = [size // part for size, part in zip(grid, window, strict=True)]
    x = windows.view(-1, *counts, *window, windows.shape[-1])
    order = [axis for number in range(1, rank + 1) for axis in (number + rank, number)]
    x = x.permute(0, *order, 2 * rank + 1).clone(memory_format=torch.contiguous_format)
    return x.view(-1, *grid, windows.shape[-1])


@table
def numbers(cut: Cut, grid: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tensor:
    """(groups, P^rank) number of the token at each place of each group of the padded grid; -1 for padding."""
    tokens = torch.arange(1, prod(grid) + 1, device=device).view(1, *grid, 1)
    padding = [(-side) % part for side, part in zip(grid, window, strict=True)]
    return cut(pad_end(tokens, padding), window).squeeze(-1) - 1


@table
def padding_mask(cut: Cut, grid: tuple[int, ...], window: tuple[int, ...], dtype: torch.dtype, device: torch.device
                 ) -> Tensor:
    """(groups, 1, 1, P^rank): -inf for padded keys, else 0."""
    padded = numbers(cut, grid, window, device) < 0
    return torch.zeros(padded.shape, dtype=dtype, device=device).masked_fill(padded, -torch.inf)[:, None, None]


class BlockAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + bias) v) among the P x P tokens of each block: (B, *grid, C) -> the same."""

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset, in blocks", "softmax", "sum of v")
    cut: Cut = staticmethod(partition)
    join = staticmethod(merge)

    def __init__(self, site: Site, window: int | tuple[int, ...] = 7) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.window = (window,) * site.rank if isinstance(window, int) else tuple(window)
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.bias = RelativeBias(self.window, site.heads)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        B, *grid, C = x.shape
        x = pad_to_multiple(x, self.window)
        padded = tuple(x.shape[1:-1])
        q, k, v = self.qkv(self.cut(x, self.window)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias()
        if not (all(isinstance(side, int) for side in grid) and padded == tuple(grid)):
            mask = padding_mask(self.cut, tuple(grid), self.window, bias.dtype, x.device)
            bias = (bias + mask).expand(B, -1, -1, -1, -1).flatten(0, 1)

        def where() -> tuple[Tensor, Tensor]:
            tokens = numbers(self.cut, tuple(grid), self.window, x.device)
            return tokens, tokens

        out = attend(q, k, v, bias, where=where).transpose(1, 2).flatten(2)
        return crop(self.join(self.proj(out), self.window, padded), tuple(grid))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 + 2 N P^rank C over the N tokens of the padded grid."""
        tokens = prod(side + (-side) % part for side, part in zip(grid, self.window, strict=True))
        return 4 * tokens * site.dim**2 + 2 * tokens * prod(self.window) * site.dim

    def reach(self, site: Site) -> tuple[int, ...] | None:
        """From one end of a block to the other."""
        return tuple(side - 1 for side in self.window)


class GridAttention(BlockAttention):
    """The same among the P x P tokens that lie grid/P apart: sparse, and over the whole map."""

    template = Template("q k^T / sqrt(d) + offset, among tokens a stride apart", "softmax", "sum of v")

    cut: Cut = staticmethod(spread)
    join = staticmethod(gather)

    def reach(self, site: Site) -> tuple[int, ...]:
        """From the first token of a group to its last, on the native grid."""
        return tuple((part - 1) * -(-side // part) for side, part in zip(site.grid, self.window, strict=True))


class GeluTanh(Gelu):
    """GELU in its tanh approximation, in place where no gradient is taken."""

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.gelu(hidden, approximate="tanh")
        return torch.ops.aten.gelu_(hidden, approximate="tanh")


class MultiAxisBlock(Block):
    """A mixer and an MLP; in even blocks an MBConv before them, which downsamples where the stage begins."""

    def __init__(self, site: Site, mixer: nn.Module, drop_path: float, before: int) -> None:
        super().__init__(site, mixer, drop_path=drop_path, norm=nn.LayerNorm, mlp=partial(Mlp, activation=GeluTanh))
        dim, stride = (site.dim, 1) if site.index else (before, 2)
        self.conv = nn.Identity() if site.index % 2 else MBConv(
            site.rank, dim, site.dim, stride=stride, activation=GeluTanh, drop_path=drop_path)

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        return super().forward(self.conv(x), **optional)


class HiddenHead(Head):
    """fc(tanh(hidden(norm(mean))))."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool, norm=nn.LayerNorm)
        self.norm = nn.Sequential(self.norm, nn.Linear(dim, dim), nn.Tanh())


SIZES: dict[str, dict[str, Any]] = {
    "maxvit_tiny_tf": dict(stem=64, dims=(64, 128, 256, 512), depths=(2, 2, 5, 2)),
    "maxvit_small_tf": dict(stem=64, dims=(96, 192, 384, 768), depths=(2, 2, 5, 2)),
    "maxvit_base_tf": dict(stem=64, dims=(96, 192, 384, 768), depths=(2, 6, 14, 2)),
    "maxvit_large_tf": dict(stem=128, dims=(128, 256, 512, 1024), depths=(2, 6, 14, 2)),
    "maxvit_xlarge_tf": dict(stem=192, dims=(192, 384, 768, 1536), depths=(2, 6, 14, 2)),
}
SIZES |= {f"{name}_{side}": size | dict(img_size=side) for name, size in SIZES.items() for side in _SIDES[1:]}
SIZES["maxvit_nano"] = dict(stem=16, dims=(32, 64, 128), depths=(1, 1, 1), window=4, img_size=32)


def maxvit(
    stem: int,
    dims: Sequence[int],
    depths: Sequence[int],
    window: int | None = None,
    head_dim: int = 32,
    img_size: int | Sequence[int] = 224,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A MaxViT of a size; `window` is P, 7 or img_size/32 unless told."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    native = tuple(max(side // 2 ** (len(dims) + 1), 1) for side in sides)
    own: Any = window or (7 if all(side % 7 == 0 for side in native) else native)

    def image(rank: int, in_chans: int, dim: int) -> ConvStem:
        return ConvStem(SameConv(rank, in_chans, stem, stride=2), BatchNorm(stem, eps=1e-3), GeluTanh(),
                        SameConv(rank, stem, stem))

    def block(site: Site, mixer: nn.Module, drop_path: float) -> MultiAxisBlock:
        return MultiAxisBlock(site, mixer, drop_path, before=(stem, *dims)[site.stage])

    def attention(site: Site) -> BlockAttention:
        return (GridAttention if site.index % 2 else BlockAttention)(site, own)

    return Pyramid(
        dims, [2 * depth for depth in depths], [dim // head_dim for dim in dims], stem=image,
        downsample=lambda rank, dim, out_dim: nn.Identity(), block=block, mixer=attention, head=HiddenHead,
        img_size=img_size, replace=mixer, **common,
    )


def _offsets(bias: Tensor) -> Tensor:
    """(heads, 2P - 1, 2P - 1) by key - query as (offsets, heads) by query - key."""
    return bias.flip(1, 2).flatten(1).T


ATTENTION: KeyMap = (
    (r"attn\.rel_pos\.relative_position_bias_table", "mixer.bias.table", _offsets),
    (r"attn\.(.*)", r"mixer.\1"),
    (r"((?:norm|mlp).*)", r"\1"),
)
CONVOLUTION: KeyMap = (
    (r"shortcut\.expand\.weight", "project.weight", matrix_from_1x1),
    (r"shortcut\.expand\.bias", "project.bias"),
    (r"pre_norm\.(.*)", r"norm.\1"),
    (r"conv1_1x1\.weight", "expand.0.weight", matrix_from_1x1),
    (r"norm1\.(.*)", r"expand.1.\1"),
    (r"conv2_kxk\.weight", "depthwise.0.conv.weight"),
    (r"norm2\.(.*)", r"depthwise.1.\1"),
    (r"se\.(fc\d)\.weight", r"squeeze.\1.weight", matrix_from_1x1),
    (r"se\.(.*)", r"squeeze.\1"),
    (r"conv3_1x1\.weight", "shrink.weight", matrix_from_1x1),
    (r"conv3_1x1\.bias", "shrink.bias"),
)
# The names of timm, into which the authors' TensorFlow checkpoints were converted.
AUTHORS: KeyMap = (
    (r"stem\.conv1\.(.*)", r"stem.0.conv.\1"),
    (r"stem\.norm1\.(.*)", r"stem.1.\1"),
    (r"stem\.conv2\.(.*)", r"stem.3.conv.\1"),
    *(rule for block in range(14) for part, rules, ours in (
        ("conv", CONVOLUTION, f"{2 * block}.conv."), ("attn_block", ATTENTION, f"{2 * block}."),
        ("attn_grid", ATTENTION, f"{2 * block + 1}."))
      for rule in within(rules, rf"stages\.(\d+)\.blocks\.{block}\.{part}\.", rf"stages.\1.blocks.{ours}")),
    (r"head\.norm\.(.*)", r"head.norm.0.\1"),
    (r"head\.pre_logits\.fc\.(.*)", r"head.norm.1.\1"),
)
TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
