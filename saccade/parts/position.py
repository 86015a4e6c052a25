"""Position tables that belong to a native grid and are resampled to the grid that comes."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def is_native(grid: tuple[int, ...], native: tuple[int, ...]) -> bool:
    """Whether a table can be used as it is. A symbolic size never says yes: the question would fix it for good."""
    return all(isinstance(side, int) for side in (*grid, *native)) and tuple(grid) == tuple(native)


def resample(table: Tensor, grid: tuple[int, ...], linear: bool = False) -> Tensor:
    """(1, *native, C) -> (1, *grid, C): bicubic for images unless `linear` (linear for sequences and volumes).

    No antialiasing, align_corners=False, as in DeiT's and Swin's own loading code.
    """
    if is_native(grid, tuple(table.shape[1:-1])):
        return table
    mode = (LINEAR if linear else MODES)[len(grid)]
    resized = F.interpolate(table.movedim(-1, 1).float(), size=grid, mode=mode, align_corners=False)
    return resized.movedim(1, -1).to(table.dtype)


class Position(nn.Module):
    """x + table, a learned table (1, N, C) of the N tokens of a native grid, resampled (bicubic unless `linear`)."""

    undecayed = ("table",)

    def __init__(self, dim: int, grid: tuple[int, ...], linear: bool = False) -> None:
        super().__init__()
        self.grid, self.linear = grid, linear
        self.table = nn.Parameter(torch.zeros(1, prod(grid), dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + resample(self.table.unflatten(1, self.grid), tuple(x.shape[1:-1]), self.linear)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The table of a square grid of another side, for this grid."""
        side = round(value.shape[1] ** (1 / len(self.grid)))
        if side ** len(self.grid) != value.shape[1]:
            return value
        square = value.unflatten(1, (side,) * len(self.grid))
        return resample(square, self.grid, self.linear).flatten(1, -2)
