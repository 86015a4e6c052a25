"""DRCT: dense connections inside each group, so that what was seen is not lost on the way down.

The deeper a super-resolution transformer, the narrower the range of its features, and the last layers throw much away.
A group of DRCT is five window attention blocks whose inputs pile up: block i reads the group's input and what all
blocks before made of it, each in `growth` channels, and the last goes back to C,
    x_i = lrelu(adjust_i(block_i([x, x_1, ..., x_{i-1}]))),   out = x + 0.2 adjust_5(block_5([x, x_1, ..., x_4])).

Hsu, Lee, Chou, "DRCT: Saving Image Super-resolution away from Information Bottleneck", 2024, section 3.2.

Any picture: its sides are reflected to whole windows. Quirks kept: the heads of block i are h - (width mod h); every
group has five blocks, whatever its depth is said to be; blocks four and five have MLPs of ratio 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.parts.block import Block
from saccade.parts.mlp import Mlp
from saccade.parts.pyramid import drop_path_rates
from saccade.parts.restoration.body import SKELETON, SuperResolver
from saccade.parts.window import ShiftingAttention

CARD = Card(
    "DRCT: Saving Image Super-resolution away from Information Bottleneck",
    authors="Hsu, Lee, Chou",
    year=2024,
    systems=("drct",),
    arxiv="2404.00722",
    code="ming053l/DRCT@c0a8b51",
    licence="MIT",
    read="paper, code",
    keywords="super-resolution, dense residual connection, shifted window attention, information bottleneck",
    kinds=("restoration",),
    params={"drct_x4": 14.13e6, "drct_l_x4": 27.58e6},
    weights={name: Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing", data=data)
             for name, file, data in (("drct_x4", "1jw2UWAersWZecPq-c_g5RM3mDOoc_cbd", "DF2K"),
                                      ("drct_l_x4", "1bVxvA6QFbne2se0CQJ-jyHFy94UOi3h5", "ImageNet-1K, DF2K"))},
    goldens=("drct_x4", "op_drct_rdg"),
    tests=("tests/papers/test_drct.py",),
)

BLOCKS = 5


class DenseGroup(nn.Module):
    """x + 0.2 x_5, each x_i from x and all before it: (B, H, W, C) -> the same."""

    def __init__(
        self, site: Site, window: int, growth: int = 32, ratio: float = 2.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        blocks, adjust = [], []
        for number in range(BLOCKS):
            dim = site.dim + number * growth
            at = Site(dim, site.heads - dim % site.heads, index=number, grid=site.grid)
            blocks.append(Block(at, ShiftingAttention(at, window, number % 2 * (window // 2)), norm=nn.LayerNorm,
                                mlp=partial(Mlp, ratio=ratio if number < 3 else 1.0), drop_path=drop_path))
            adjust.append(nn.Linear(dim, growth if number < BLOCKS - 1 else site.dim))
        self.blocks, self.adjust = nn.ModuleList(blocks), nn.ModuleList(adjust)

    def forward(self, x: Tensor) -> Tensor:
        pile = x
        for block, adjust in zip(self.blocks[:-1], self.adjust, strict=False):
            pile = torch.cat([pile, F.leaky_relu(adjust(block(pile)), 0.2)], -1)
        return x + 0.2 * self.adjust[-1](self.blocks[-1](pile))


SIZES: dict[str, dict[str, Any]] = {
    f"drct{suffix}_x{scale}": dict(scale=scale, groups=groups)
    for suffix, groups in (("", 6), ("_l", 12)) for scale in (2, 3, 4)
}


def drct(
    scale: int,
    groups: int = 6,
    dim: int = 180,
    heads: int = 6,
    window: int = 16,
    growth: int = 32,
    ratio: float = 2.0,
    in_chans: int = 3,
    drop_path_rate: float = 0.1,
) -> SuperResolver:
    """A DRCT of so many groups."""
    site = Site(dim, heads, grid=(window, window))
    dense = [DenseGroup(site, window, growth, ratio, rate) for rate in drop_path_rates(drop_path_rate, groups)]
    return SuperResolver(scale, dim, dense, window, in_chans)


GROUP: KeyMap = (
    Dropped(r"swin\d\.(attn_mask|attn\.relative_position_index)", "derived buffer"),
    *(rule for number in range(BLOCKS) for rule in (
        (rf"swin{number + 1}\.attn\.relative_position_bias_table", f"blocks.{number}.mixer.bias.table"),
        (rf"swin{number + 1}\.attn\.(.*)", rf"blocks.{number}.mixer.\1"),
        (rf"swin{number + 1}\.(.*)", rf"blocks.{number}.\1"),
        (rf"adjust{number + 1}\.weight", f"adjust.{number}.weight", matrix_from_1x1),
        (rf"adjust{number + 1}\.bias", f"adjust.{number}.bias"),
    )),
)
AUTHORS: KeyMap = (*within(GROUP, r"layers\.(\d+)\.", r"groups.\1."), *SKELETON)
TAPS = {r"layer(\d+)": r"groups.\1"}
