"""HAT: window attention beside channel attention, and windows that look over their borders, for super-resolution.

A hybrid block adds a channel attention block to shifted window attention on the same normed map, faintly,
    x += attention(norm(x)) + alpha CAB(norm(x));   x += mlp(norm(x)),
CAB two 3x3 convolutions and squeeze-excitation, alpha 0.01. Each group of such blocks ends with overlapping
cross-attention: queries of M x M windows look at windows of (1 + overlap) M around them. Groups, a convolution each,
stand in a long residual, and pixel shuffles make the larger picture.

Chen, Wang, Zhou, Qiao, Dong, "Activating More Pixels in Image Super-Resolution Transformer", 2023, section 3.2; "HAT:
Hybrid Attention Transformer for Image Restoration", 2023.

Any picture: its sides are reflected to whole windows (as the authors' test code does). Quirks kept: keys beyond the
border are zeros after their projection, and not masked; the bias of overlapping windows is indexed past the start of
its table, from where it goes on at the end; a single window shifts too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.window import merge, pad_ends, partition
from saccade.parts.attention import check_heads
from saccade.parts.block import residual_tail
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.pyramid import drop_path_rates
from saccade.parts.restoration.body import SKELETON, SuperResolver, same_conv
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.window import ShiftingAttention

CARD = Card(
    "HAT: Hybrid Attention Transformer for Image Restoration",
    authors="Chen, Wang, Zhang, Kong, Qiao, Zhou, Dong",
    year=2023,
    systems=("hat",),
    arxiv="2205.04437, 2309.05239",
    code="XPixelGroup/HAT@1638a9a",
    licence="Apache-2.0",
    read="paper, code",
    keywords="super-resolution, hybrid attention, channel attention, overlapping cross-attention, image restoration",
    kinds=("restoration",),
    params={"hat_s_x4": 9.6e6, "hat_x4": 20.8e6, "hat_l_x4": 40.8e6},
    weights={  # one folder
        name: Weights(f"https://drive.google.com/drive/folders/1HpmReFfoUqUbnAOQ7rvOeNU3uf_m69w0?usp=sharing#{name}",
                      data="ImageNet-1K, DF2K" if "_l_" in name else "DF2K")
        for name in (f"hat{size}_x{scale}" for size in ("_s", "", "_l") for scale in (2, 3, 4))
    },
    goldens=("hat_s_x2", "op_hat_cab", "op_hat_hab_shift", "op_hat_ocab"),
    tests=("tests/papers/test_hat.py",),
)


def channel_attention(dim: int, compress: int, squeeze: int) -> nn.Sequential:
    """Two 3x3 convolutions over C / compress channels and squeeze-excitation over C / squeeze, on (B, H, W, C)."""
    return nn.Sequential(same_conv(dim, dim // compress), Gelu(), same_conv(dim // compress, dim),
                         SqueezeExcite(dim, dim // squeeze))


class HybridBlock(nn.Module):
    """x += attention(norm(x)) + alpha CAB(norm(x)); x += mlp(norm(x)): (B, H, W, C) -> the same."""

    def __init__(
        self, site: Site, window: int, shift: int, compress: int = 3, squeeze: int = 30, alpha: float = 0.01,
        ratio: float = 4.0, drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.norm1, self.norm2 = nn.LayerNorm(site.dim), nn.LayerNorm(site.dim)
        self.attention = ShiftingAttention(site, window, shift)
        self.channels = channel_attention(site.dim, compress, squeeze)
        self.mlp = Mlp(site.dim, ratio)
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.tail(self.attention(normed)) + self.alpha * self.channels(normed)
        return x + self.tail(self.mlp(self.norm2(x)))


class OverlappingBlock(nn.Module):
    """x += cross-attention of windows to larger ones around them; x += mlp(norm(x)): (B, H, W, C), whole windows."""

    def __init__(self, site: Site, window: int, overlap: float = 0.5, ratio: float = 2.0) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.window = site.heads, window
        self.wide = window + int(overlap * window)
        self.norm1, self.norm2 = nn.LayerNorm(site.dim), nn.LayerNorm(site.dim)
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.bias = nn.Parameter(torch.zeros((window + self.wide - 1) ** 2, site.heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.proj = nn.Linear(site.dim, site.dim)
        self.mlp = Mlp(site.dim, ratio)

    def forward(self, x: Tensor) -> Tensor:
        C, sides = x.shape[-1], (self.window, self.window)
        q, kv = self.qkv(self.norm1(x)).split((C, 2 * C), -1)
        around = (self.wide - self.window) // 2
        kv = pad_ends(kv, [(around, around)] * 2)
        kv = kv.unfold(1, self.wide, self.window).unfold(2, self.wide, self.window)  # (B, rows, columns, 2C, e, e)
        kv = kv.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (partition(q, sides), *kv.chunk(2, -1)))
        bias = self.bias[overlapping_index(self.window, self.wide, x.device)].permute(2, 0, 1)
        out = attend(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + self.proj(merge(out, sides, tuple(x.shape[1:-1])))
        return x + self.mlp(self.norm2(x))


@table
def overlapping_index(window: int, wide: int, device: torch.device) -> Tensor:
    """(window^2, wide^2) rows of the bias: the offset key - query, before the start of the table from its end on."""
    side = window + wide - 1
    query, key = (torch.cartesian_prod(torch.arange(length, device=device), torch.arange(length, device=device))
                  for length in (window, wide))
    offset = key[None] - query[:, None] + window - wide + 1
    return (offset[..., 0] * side + offset[..., 1]) % side**2


class Group(nn.Module):
    """x + conv(overlapping(blocks(x))): (B, H, W, C) -> the same."""

    def __init__(self, blocks: list[nn.Module], overlapping: nn.Module, dim: int) -> None:
        super().__init__()
        self.blocks, self.overlapping, self.conv = nn.Sequential(*blocks), overlapping, same_conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.overlapping(self.blocks(x)))


_SIZES: dict[str, dict[str, Any]] = {
    "hat_s": dict(dim=144, compress=24, squeeze=24),
    "hat": {},
    "hat_l": dict(depths=(6,) * 12, heads=(6,) * 12),
    "hat_nano": dict(dim=32, depths=(2, 2), heads=(2, 2), window=8, squeeze=8, drop_path_rate=0.0),  # to try things out
}
SIZES: dict[str, dict[str, Any]] = {
    f"{name}_x{scale}": dict(size, scale=scale) for name, size in _SIZES.items() for scale in (2, 3, 4)
}


def hat(
    scale: int,
    dim: int = 180,
    depths: tuple[int, ...] = (6,) * 6,
    heads: tuple[int, ...] = (6,) * 6,
    window: int = 16,
    compress: int = 3,
    squeeze: int = 30,
    alpha: float = 0.01,
    overlap: float = 0.5,
    ratio: float = 2.0,
    in_chans: int = 3,
    drop_path_rate: float = 0.1,
) -> SuperResolver:
    """A HAT of a size; alpha weighs the channel attention."""
    rates, groups = iter(drop_path_rates(drop_path_rate, sum(depths))), []
    for depth, count in zip(depths, heads, strict=True):
        site = Site(dim, count, grid=(window, window))
        blocks: list[nn.Module] = [
            HybridBlock(site, window, index % 2 * (window // 2), compress, squeeze, alpha, ratio, next(rates))
            for index in range(depth)
        ]
        groups.append(Group(blocks, OverlappingBlock(site, window, overlap, ratio), dim))
    return SuperResolver(scale, dim, groups, window, in_chans)


CAB: KeyMap = (
    (r"cab\.([02])\.(.*)", r"\1.\2"),
    (r"cab\.3\.attention\.1\.weight", "3.fc1.weight", matrix_from_1x1),
    (r"cab\.3\.attention\.3\.weight", "3.fc2.weight", matrix_from_1x1),
    (r"cab\.3\.attention\.1\.bias", "3.fc1.bias"),
    (r"cab\.3\.attention\.3\.bias", "3.fc2.bias"),
)
BLOCK: KeyMap = (
    (r"attn\.relative_position_bias_table", "attention.bias.table"),
    (r"attn\.(.*)", r"attention.\1"),
    *within(CAB, r"conv_block\.", "channels."),
    (r"(norm\d|mlp)\.(.*)", r"\1.\2"),
)
OVERLAPPING: KeyMap = ((r"relative_position_bias_table", "bias"), (r"(norm\d|mlp|qkv|proj)\.(.*)", r"\1.\2"))
AUTHORS: KeyMap = (
    Dropped(r"relative_position_index_.*", "derived buffer"),
    *within(BLOCK, r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.", r"groups.\1.blocks.\2."),
    *within(OVERLAPPING, r"layers\.(\d+)\.residual_group\.overlap_attn\.", r"groups.\1.overlapping."),
    (r"layers\.(\d+)\.conv\.(.*)", r"groups.\1.conv.\2"),
    *SKELETON,
)
TAPS = {r"layer(\d+)": r"groups.\1", "conv_after_body": "conv"}
