"""Self-attention along some axes of the grid only: rows, columns, time, single frames."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.parts.attention import Attention

Grid = tuple[int, ...]


class AxesAttention(Attention):
    """Attention among the tokens that share their place on every axis but `axes`: time alone, or a frame.

    (Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", 2021, section 3.)
    """

    prefix = False

    def __init__(self, site: Site, axes: Sequence[int]) -> None:
        super().__init__(site)
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        grid = tuple(x.shape[1:-1])
        shared = [axis for axis in range(len(grid)) if axis not in self.axes]
        order = [*shared, *self.axes]
        qkv = self.qkv(x).permute(0, *(axis + 1 for axis in order), -1)  # (B, *shared, *axes, 3 C)
        lines = qkv.flatten(len(shared) + 1, -2).flatten(0, len(shared))
        q, k, v = lines.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def where() -> tuple[Tensor, Tensor]:
            tokens = line_tokens(grid, self.axes, x.device)
            return tokens, tokens

        out = attend(q, k, v, where=where).transpose(1, 2).reshape(*qkv.shape[:-1], x.shape[-1])
        return self.proj(out.permute(0, *(order.index(axis) + 1 for axis in range(len(grid))), -1).contiguous())

    def reach(self, site: Site) -> Grid:  # type: ignore[override]
        return tuple(side - 1 if axis in self.axes else 0 for axis, side in enumerate(site.grid))

    def cost(self, site: Site, grid: Grid) -> int:  # type: ignore[override]
        """Multiply-adds of N tokens with M keys each: 4 N C^2 + 2 N M C."""
        return prod(grid) * site.dim * (4 * site.dim + 2 * prod(grid[axis] for axis in self.axes))


@table
def line_tokens(grid: Grid, axes: Grid, device: torch.device) -> Tensor:
    """(groups, tokens a group) numbers of the tokens that share their place on every axis but `axes`."""
    shared = [axis for axis in range(len(grid)) if axis not in axes]
    numbers = torch.arange(prod(grid), device=device).view(grid).permute(*shared, *axes)
    return numbers.reshape(-1, prod(grid[axis] for axis in axes))
