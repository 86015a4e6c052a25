"""TiC: self-attention in the sliding window of a convolution, so that no size is bound to the weights.

Multi-head self-attention convolution (MSA-Conv) attends to the k x k positions around each token, as a standard or a
dilated convolution looks at them, and convolves what it found,
    a_i = softmax_o(q_i . k_{i + o} / sqrt(d)),   y = relu(conv_{k x k}(x + sum_o a_{i, o} v_{i + o})).
Two mechanisms widen the field. Multi-directional cyclic shift: each head rolls its keys and values in a direction of
its own, so that windows open on distant places. Inter-pooling: the window also holds k x k means of 2 x 2 tokens.

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution", 2023.

Any grid: nothing belongs to a size; a 2 x 2 mean counts no padding.
Quirks kept: a position outside the grid has logit 0 and value 0 and takes its share of the softmax (`masked` leaves it
out); the published layer has one head, scaled by all its channels, and a convolution that is never dilated.
Only the layer is published. The network is a reconstruction: heads shift in turn to the eight directions or not at all,
by k // 2 times a block's place in its stage; every second block pools; the convolution is depthwise; batch norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, pointwise
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.local import local_scores, local_sum, neighbour_tokens
from saccade.ops.tables import table
from saccade.ops.window import crop
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.mbconv import SamePool
from saccade.parts.merging import ConvMerging
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import global_tokens

CARD = Card(
    "TiC: Exploring Vision Transformer in Convolution",
    authors="Zhang, Wang, Bian, Xiong",
    year=2023,
    systems=("tic",),
    arxiv="2310.04134",
    code="StriveZs/MSA-Conv@2d96f54",
    read="paper",
    keywords="self-attention convolution, MSA-Conv, sliding window, multi-directional cyclic shift, inter-pooling",
    kinds=("backbone", "mixer"),
    mixers={"msa_conv": "ShiftedMsaConv"},
    goldens=("op_msa_conv", "op_msa_conv_dilated_stride2"),
    tests=("tests/papers/test_tic.py",),
)


class MsaConv(nn.Module):
    """relu(conv(x + attention in the window around each token)): (B, *grid, C) -> (B, *grid', out).

    The convolution alone strides; its padding is its own. `shifts` has the steps, one an axis, by which each head rolls
    its keys and values; `pooled` adds the window of means of 2^n tokens; `groups` are the convolution's.
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        out_dim: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
        shifts: Sequence[tuple[int, ...]] | None = None,
        pooled: bool = False,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise SaccadeError(f"kernel={kernel}: MSA-Conv looks as far to every side; give an odd number")
        self.kernel, self.dilation, self.masked = kernel, dilation, masked
        self.shifts = [(0,) * rank] if shifts is None else list(shifts)
        self.heads = len(self.shifts)
        check_heads(Site(dim, self.heads))
        self.pool = SamePool() if pooled else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.conv = grid_conv(rank, dim, out_dim, kernel, stride=stride, groups=groups, bias=bias,
                              padding=kernel // 2 if padding is None else padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.attend(x)).relu()

    def attend(self, x: Tensor) -> Tensor:
        """The values around each token, weighted: (B, *grid, C)."""
        grid, device = tuple(x.shape[1:-1]), x.device
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = q * q.shape[-1] ** -0.5, self.rolled(k), self.rolled(v)
        sources = [(k, v, self.dilation)]
        if self.pool is not None:
            sources.append((self.cells(k), self.cells(v), 2 * self.dilation))
        scores = torch.cat([local_scores(q, key, self.kernel, step) for key, _, step in sources], -1)
        if self.masked:
            outside = torch.cat([neighbour_tokens(grid, self.kernel, device, step) for *_, step in sources], -1) < 0
            scores = scores.masked_fill(outside.view(*grid, 1, -1), -torch.inf)
        weights = scores.softmax(-1)
        if recording():
            self.note(weights, [step for *_, step in sources])
        parts = weights.split(self.kernel ** len(grid), -1)
        mixed = [local_sum(part, value, self.kernel, step)
                 for part, (_, value, step) in zip(parts, sources, strict=True)]
        return (mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]).flatten(-2)

    def rolled(self, x: Tensor) -> Tensor:
        """(B, *grid, h, d) with each head rolled by its steps."""
        if not any(any(steps) for steps in self.shifts):
            return x
        axes = tuple(range(1, x.ndim - 2))
        return torch.stack([head.roll(steps, axes) for head, steps in zip(x.unbind(-2), self.shifts, strict=True)], -2)

    def cells(self, x: Tensor) -> Tensor:
        """Each token's cell: the mean of the 2^n tokens of a cell, at each of them. (B, *grid, h, d) -> the same."""
        assert self.pool is not None
        grid = tuple(x.shape[1:-2])
        means = self.pool(x.flatten(-2))
        for axis in range(1, means.ndim - 1):
            means = means.repeat_interleave(2, axis)
        return crop(means, grid).unflatten(-1, x.shape[-2:])

    def note(self, weights: Tensor, steps: Sequence[int]) -> None:
        """The weights as maps of tokens and padding, a pooled one at the token of its cell that the window meets."""
        grid = tuple(weights.shape[1:-2])
        keys = torch.stack([
            torch.cat([rolled_tokens(grid, self.kernel, step, shift, weights.device) for step in steps], -1)
            for shift in self.shifts])
        flat = weights.flatten(1, -3).transpose(1, 2)  # (B, h, N, K)
        dense = flat.new_zeros(*flat.shape[:-1], prod(grid) + 1).scatter_add(-1, keys.expand(flat.shape), flat)

        def where() -> tuple[Tensor, Tensor]:
            tokens, _ = global_tokens(prod(grid), weights.device)
            return tokens, torch.cat([tokens, tokens.new_full((1, 1), -1)], 1)

        note(dense, where)


@table
def rolled_tokens(
    grid: tuple[int, ...], kernel: int, dilation: int, shift: tuple[int, ...], device: torch.device
) -> Tensor:
    """(N, kernel^n) number of the token that each token sees at each offset of a rolled grid; N outside the grid."""
    near = neighbour_tokens(grid, kernel, device, dilation)
    numbers = torch.arange(prod(grid), device=device).view(grid).roll(shift, tuple(range(len(grid)))).flatten()
    return torch.where(near < 0, prod(grid), numbers[near.clamp(min=0)])


class ShiftedMsaConv(MsaConv):
    """MSA-Conv as a token mixer: (B, *grid, C) -> (B, *grid, C), `shift` steps a head, pooled in every second block.

    By default `shift` is kernel // 2 times the block's place in its stage: none in the first.
    """

    ranks, weights = (1, 2, 3), True
    template = Template(
        "q k^T / sqrt(d) in the neighbourhood", "softmax", "sum of v, shifted a head, and a convolution"
    )

    def __init__(
        self,
        site: Site,
        kernel: int = 7,
        dilation: int = 1,
        depthwise: bool = True,
        shift: int | None = None,
        pooled: bool | None = None,
        masked: bool = False,
    ) -> None:
        groups = site.dim if depthwise else 1
        self.summed = site.dim // groups
        self.shift = kernel // 2 * site.index if shift is None else shift
        directions = sorted(product((0, 1, -1), repeat=site.rank), key=lambda steps: sum(map(abs, steps)))
        shifts = [tuple(self.shift * step for step in directions[(site.index * site.heads + head) % len(directions)])
                  for head in range(site.heads)]
        super().__init__(site.rank, site.dim, site.dim, kernel, dilation=dilation, shifts=shifts, masked=masked,
                         groups=groups, pooled=site.index % 2 == 1 if pooled is None else pooled)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token: 3 C^2 + 2 K C + C C' k^n, K keys and C' channels that the convolution sums."""
        window = self.kernel**site.rank
        keys = window * (1 if self.pool is None else 2)
        return prod(grid) * (3 * site.dim**2 + 2 * keys * site.dim + window * self.summed * site.dim)

    def reach(self, site: Site) -> tuple[int, ...]:
        """Two windows; with a cyclic shift, from one border to the other."""
        if any(any(steps) for steps in self.shifts):
            return tuple(side - 1 for side in site.grid)
        half = self.kernel // 2
        return (half + (half * self.dilation if self.pool is None else 2 * half * self.dilation + 1),) * site.rank


SIZES: dict[str, dict[str, Any]] = {
    "tic": dict(dims=(64, 128, 320, 512), depths=(2, 2, 6, 2)),
    "tic_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), kernel=3, patch=2, img_size=32),
}


def tic(
    dims: Sequence[int], depths: Sequence[int], kernel: int = 7, patch: int = 4, mixer: Any = None, **common: Any
) -> Pyramid:
    """A TiC of a size, with heads of 32 channels; `patch` is the stride of the first stage."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        return ConvStem(*conv_norm(rank, in_chans, dim // 2, stride=patch // 2), nn.ReLU(),
                        *conv_norm(rank, dim // 2, dim, stride=2))

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch,
        downsample=partial(ConvMerging, norm=BatchNorm), block=partial(Block, norm=BatchNorm),
        mixer=partial(ShiftedMsaConv, kernel=kernel), norm=BatchNorm, replace=mixer, **common,
    )


LAYER: KeyMap = (
    (r"qkv_conv\.(.*)", r"qkv.\1", pointwise),
    (r"mlp\.(.*)", r"conv.\1"),
)
