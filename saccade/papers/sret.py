"""SReT: the same block twice in a row, and attention in slices of the sequence so that twice costs little more.

A block of weights theta is applied, followed by a small MLP of its own, and applied again:
    z <- G_1(F(z; theta)),   z <- G_2(F(z; theta)),
F being c_1 z + c_2 attention(norm(z)), then c_3 z + c_4 mlp(norm(z)), with learned numbers c in place of plain sums.
Attention stays inside groups of consecutive tokens; in the second pass the sequence is shuffled first, cut in fewer
groups, and put in order again. Three stages, without class token. `recursive` shares the weights of any backbone in the
same way.

Shen, Liu, Xing, "Sliced Recursive Transformer", 2022, section 3.

Any grid: where the groups do not divide the tokens, zeros are added at the end, and no token looks at them. The
position table is resampled (bicubic).
Quirks kept: the authors shuffle anew in every forward. Here so in training; in evaluation the shuffle is fixed, a
permutation of N tokens from NumPy's RandomState(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.names import matching
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.sizes import smaller
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.head import Head
from saccade.parts.mlp import Mlp
from saccade.parts.position import Position
from saccade.parts.pyramid import Pyramid, check_sizes
from saccade.parts.stem import ConvStem

_TABLE = {  # parameters, multiply-adds, top-1
    "sret_t": (4.8e6, 1.1e9, 76.0), "sret_lt": (5.0e6, 1.2e9, 76.7), "sret_lt_16_14_1": (5.0e6, 1.2e9, 76.6),
    "sret_s": (20.9e6, 4.2e9, 81.9), "sret_t_wo_slice": (4.8e6, 1.4e9, 76.1), "sret_lt_wo_slice": (5.0e6, 1.4e9, 76.8),
    "sret_s_wo_slice": (20.9e6, 4.7e9, 82.0), "sret_t_wo_slice_384": (4.9e6, 6.4e9, 79.7),
    "sret_s_wo_slice_384": (21.0e6, 18.5e9, 83.8), "sret_s_wo_slice_512": (21.3e6, 42.8e9, 84.3),
}

CARD = Card(
    "Sliced Recursive Transformer",
    authors="Shen, Liu, Xing",
    year=2022,
    systems=("sret",),
    arxiv="2111.05297",
    code="szq0214/SReT@af6db0a",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="recursion, weight sharing across depth, sliced group self-attention, permutation, "
             "learnable coefficients, non-linear projection layer",
    kinds=("backbone", "mixer"),
    mixers={"sliced_group": "SlicedGroup"},
    params={name: row[0] for name, row in _TABLE.items()},
    macs={name: row[1] for name, row in _TABLE.items()},
    # Those at 384 and 512 were distilled as well.
    top1={name: row[2] for name, row in _TABLE.items()},
    # "_distill" trains the same network; the golden `sret_t_coef` is sret_t under other names.
    aliases={**{f"sret_{size}_distill": f"sret_{size}" for size in ("t", "lt", "s")}, "sret_t_coef": "sret_t"},
    weights={
        f"sret_{name}": Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing", top1=top1)
        for name, file, top1 in (  # distilled where it is sret_lt, sret_lt_wo_slice, or larger than 224
            ("t", "1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni", None), ("s", "1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed", None),
            ("t_wo_slice", "1wHM7NRSkz-WykCSES17xFV56h_m5RMXj", None),
            ("lt", "1l6u0q4kwli5czEyo4TeJANtqsulh-J5G", 77.7),
            ("lt_wo_slice", "1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i", 77.9),
            ("lt_16_14_1", "1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV", None),
            ("s_wo_slice", "1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm", None),
            ("t_wo_slice_384", "11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be", None),
            ("s_wo_slice_384", "1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-", None),
            ("s_wo_slice_512", "1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB", None),
        )
    },
    goldens=("sret_t", "sret_t_coef", "op_sret_group_attention", "op_sret_group_attention_shuffled"),
    tests=("tests/papers/test_sret.py",),
)


class SlicedGroup(nn.Module):
    """Self-attention inside groups of consecutive tokens, shuffled first where said: (B, *grid, C) -> (B, *grid, C).

    The sequence is cut in `groups`, at most one a token. `shuffle` is what blocks of odd index do unless it is given.
    (Shen et al., SReT, 2022, section 3.3.)
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) among consecutive tokens", "softmax", "sum of v")

    def __init__(self, site: Site, groups: int = 4, shuffle: bool | None = None, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        if groups < 1:
            raise SaccadeError(f"groups={groups}: at least 1")
        self.heads, self.groups = site.heads, groups
        self.shuffle = groups > 1 and (site.index % 2 == 1 if shuffle is None else shuffle)
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = x.flatten(1, -2), tuple(x.shape[1:-1])
        B, N, C = tokens.shape
        groups = smaller(self.groups, N)
        added = (-N) % groups
        order = None
        if self.shuffle:
            order = torch.randperm(N, device=x.device) if self.training else fixed_order(tokens.detach())
            tokens = tokens.index_select(1, order)
        if not isinstance(added, int) or added:
            tokens = F.pad(tokens, [0, 0, 0, added])
        qkv = self.qkv(tokens).view(B, groups, tokens.shape[1] // groups, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # (B x groups, heads, tokens a group, d) each
        mask = None
        if not isinstance(added, int) or added:
            mask = no_padding(N, groups, k.shape[2], q.dtype, x.device).repeat(B, 1, 1, 1)

        def where() -> tuple[Tensor, Tensor]:
            numbers = torch.arange(N, device=x.device) if order is None else order
            numbers = F.pad(numbers, [0, added], value=-1).view(groups, -1)
            return numbers, numbers

        out = attend(q, k, v, mask, where=where).transpose(1, 2).reshape(B, -1, C)
        if order is not None:
            out = out.index_select(1, order.argsort())
        elif not isinstance(added, int) or added:
            out = F.pad(out, [0, 0, 0, N - out.shape[1]])
        return self.proj(out).view(B, *grid, C)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 and, with n tokens a group, 2 N n C; zeros at the end counted as tokens."""
        each = -(-prod(grid) // min(self.groups, prod(grid)))
        tokens = each * min(self.groups, prod(grid))
        return tokens * site.dim * (3 * site.dim + 2 * each) + prod(grid) * site.dim**2

    def reach(self, site: Site) -> tuple[int, ...] | None:
        """Every token where the sequence is shuffled, else the rows that a group may touch."""
        if self.shuffle:
            return None
        each = -(-prod(site.grid) // min(self.groups, prod(site.grid)))
        return (min(-(-(each - 1) // prod(site.grid[1:])), site.grid[0] - 1), *(side - 1 for side in site.grid[1:]))


@torch.library.custom_op("saccade::fixed_order", mutates_args=())
def fixed_order(tokens: Tensor) -> Tensor:
    """(N,) the permutation of the N tokens of (B, N, C) from NumPy's RandomState(N): opaque, for free N in exports."""
    return order_of(tokens.shape[1], tokens.device).clone()


@fixed_order.register_fake
def _(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[1], dtype=torch.long)


@table
def order_of(count: int, device: torch.device) -> Tensor:
    """(count,) a permutation that depends on the count alone."""
    return torch.from_numpy(np.random.RandomState(count).permutation(count)).to(device)


@table
def no_padding(count: int, groups: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(groups, 1, 1, each) 0 for tokens, the least number for what stands after the last."""
    place = torch.arange(groups * each, device=device).view(groups, 1, 1, each)
    return torch.zeros(place.shape, dtype=dtype, device=device).masked_fill(place >= count, torch.finfo(dtype).min)


class Projection(nn.Module):
    """c_1 x + c_2 mlp(norm(x)): what each application of shared weights has for its own."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm, self.mlp = LAYER_NORM(dim), Mlp(dim, ratio)
        self.gain1, self.gain2 = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain1 * x + self.gain2 * self.mlp(self.norm(x))


class WeighedBlock(Block):
    """Residual branches with a learned number before both their sides, then a small MLP.

    (Shen et al., SReT, 2022, sections 3.2 and 3.5.)
    """

    def __init__(self, site: Site, mixer: nn.Module, *, drop_path: float, ratio: float, between: float) -> None:
        super().__init__(site, mixer, drop_path=drop_path, mlp=partial(Mlp, ratio=ratio))
        self.gain1, self.gain2, self.gain3, self.gain4 = (nn.Parameter(torch.ones(1)) for _ in range(4))
        self.after = Projection(site.dim, between)

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        x = self.gain1 * x + self.gain2 * self.scale1(self.mixer(self.norm1(x), **optional))
        x = self.gain3 * x + self.gain4 * self.scale2(self.mlp(self.norm2(x)))
        return self.after(x)


def recursive(model: nn.Module, loops: int = 2, own: Sequence[str] = ()) -> nn.Module:
    """Share weights across depth: each `loops` blocks in a row have the parameters of the first of them. In place.

    `model` is a Plain (or any with `blocks`) or a Pyramid (with `stages` of `blocks`); `own` lists patterns of names
    inside a block that stay apart. Buffers (running statistics) and what has no parameters (drop path, dilation, shift)
    stay a block's own, too. Raises SaccadeError where `loops` does not divide a depth, or blocks differ in shape.
    (Shen et al., SReT, 2022, section 3.2.)
    """
    stages: Any = getattr(model, "stages", [model])
    rows = [list(stage.blocks) for stage in stages]
    for blocks in rows:
        if loops < 1 or len(blocks) % loops:
            raise SaccadeError(f"loops={loops} does not divide a depth of {len(blocks)} blocks; choose a divisor")
        for number, block in enumerate(blocks):
            _tie(block, blocks[number - number % loops], number, own)
    return model


def _tie(block: nn.Module, first: nn.Module, number: int, own: Sequence[str]) -> None:
    theirs, ours = dict(first.named_parameters()), dict(block.named_parameters())
    apart = {name for pattern in own for name in matching(ours, pattern)}
    shapes = [{name: value.shape for name, value in one.items() if name not in apart} for one in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise SaccadeError(f"block {number} has other parameters than the first of its group: they cannot be shared")
    for name in shapes[0]:
        place, _, parameter = name.rpartition(".")
        setattr(block.get_submodule(place), parameter, theirs[name])


SIZES: dict[str, dict[str, Any]] = {
    "sret_t": dict(width=32, ratio=3.6),
    "sret_lt": dict(width=32, ratio=4.0),
    "sret_s": dict(width=42, heads=(3, 6, 12), ratio=3.0, between=2.0),
    "sret_nano": dict(width=16, depths=(2, 2, 2), heads=(2, 4, 8), ratio=3.0, groups=(4, 2, 1), steps=1, img_size=32),
}
SIZES |= {f"{name}_wo_slice": SIZES[name] | dict(groups=(1, 1, 1), shuffled=(1, 1, 1))
          for name in ("sret_t", "sret_lt", "sret_s")}
SIZES |= {f"{name}_wo_slice_{side}": SIZES[f"{name}_wo_slice"] | dict(img_size=side)
          for name, side in (("sret_t", 384), ("sret_s", 384), ("sret_s", 512))}
SIZES["sret_lt_16_14_1"] = SIZES["sret_lt"] | dict(groups=(16, 14, 1), shuffled=(1, 1, 1))


def sret(
    width: int,
    ratio: float,
    depths: Sequence[int] = (4, 10, 6),
    heads: Sequence[int] = (2, 4, 8),
    between: float = 1.0,
    groups: Sequence[int] = (8, 4, 1),
    shuffled: Sequence[int] = (2, 1, 1),
    loops: int = 2,
    steps: int = 3,
    mixer: Any = None,
    img_size: int | Sequence[int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    **common: Any,
) -> Pyramid:
    """An SReT of a size: heads of `width` channels; even blocks attend in `groups`, odd ones in `shuffled` groups.

    Each `loops` blocks share weights; the MLPs after them are `between` times as wide; the stem halves the image
    `steps` times.
    """
    grid = tuple(-(-side // 2**steps) for side in check_sizes(num_classes, in_chans, img_size))

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        widths = [in_chans, *([dim // 2] if steps > 1 else []), *[dim] * max(steps - 1, 1)]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [*conv_norm(rank, before, after, stride=2, bias=True), nn.ReLU()]
        position = Position(dim, grid)
        nn.init.trunc_normal_(position.table, std=0.02)
        return ConvStem(*layers, position)

    def downsample(rank: int, dim: int, out_dim: int) -> nn.Module:
        return grid_conv(rank, dim, out_dim, 3, stride=2, padding=1, groups=dim)

    def own(site: Site) -> SlicedGroup:
        counts = shuffled if site.index % 2 else groups
        return SlicedGroup(site, counts[site.stage], bool(site.index % 2))

    model = Pyramid(
        [width * count for count in heads], depths, heads, stem=stem, stride=2**steps, downsample=downsample,
        block=partial(WeighedBlock, ratio=ratio, between=between), mixer=own, head=partial(Head, norm=LAYER_NORM),
        replace=mixer, img_size=img_size, num_classes=num_classes, in_chans=in_chans, **common,
    )
    recursive(model, loops, own=("after.*",))
    return model


def _positions_last(position: Tensor) -> Tensor:
    return position.flatten(2).mT


def _blocks(deepest: int) -> KeyMap:
    """The authors' list holds a block, its MLP, the block again, the next MLP, ..., each twice as often as ours."""
    rules: list[Any] = []
    for block in range(deepest):
        theirs, ours = rf"transformers\.(\d+)\.blocks\.{2 * block}\.", rf"stages.\1.blocks.{block}."
        after = rf"transformers\.(\d+)\.blocks\.{2 * block + 1}\."
        rules += [(rf"{theirs}attn\.(.*)", rf"{ours}mixer.\2"),
                  (rf"{theirs}coefficient(\d)\.(?:bias|weight)", rf"{ours}gain\2"),
                  (rf"{theirs}(.*)", rf"{ours}\2"),
                  (rf"{after}norm1\.(.*)", rf"{ours}after.norm.\2"),
                  (rf"{after}coefficient(\d)\.(?:bias|weight)", rf"{ours}after.gain\2"),
                  (rf"{after}(.*)", rf"{ours}after.\2")]
    return rules


AUTHORS: KeyMap = (
    ("pos_embed", "stem.9.table", _positions_last),
    *((rf"patch_embed\.conv{number + 1}\.(.*)", rf"stem.{3 * number}.\1") for number in range(3)),
    *((rf"patch_embed\.bn{number + 1}\.(.*)", rf"stem.{3 * number + 1}.\1") for number in range(3)),
    *_blocks(10),
    *((rf"pools\.{number}\.conv\.(.*)", rf"stages.{number + 1}.downsample.\1") for number in range(2)),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(3)}
