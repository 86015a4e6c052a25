"""Position tables that belong to a native grid and are resampled to the grid that comes."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.ops.tables import table

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


@table
def sincos(
    grid: tuple[int, ...], dim: int, order: tuple[int, ...] | None = None, device: torch.device | None = None
) -> Tensor:
    """Fixed positions (*grid, dim): sines and cosines of each axis' coordinate, a share of the channels an axis.

    Of an axis with the coordinate p: sin(p w_i), then cos(p w_i), w_i = 10000^(-i / n), i < n = dim / (2 axes). `order`
    of the axes in the channels, by default the last one first; channels left over are 0. (Chen, Xie, He, "An Empirical
    Study of Training Self-Supervised Vision Transformers", 2021; He et al., "Masked Autoencoders Are Scalable Vision
    Learners", 2022.)
    """
    count = dim // (2 * len(grid))
    if not count:
        raise SaccadeError(f"{dim} channels cannot hold sines and cosines of {len(grid)} axes: give {2 * len(grid)}")
    waves = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    parts = []
    for axis in reversed(range(len(grid))) if order is None else order:
        angle = torch.arange(grid[axis], dtype=torch.float64)[:, None] * waves
        shape = [1] * axis + [grid[axis]] + [1] * (len(grid) - 1 - axis) + [2 * count]
        parts.append(torch.cat([angle.sin(), angle.cos()], -1).view(shape).expand(*grid, -1))
    table = F.pad(torch.cat(parts, -1), (0, dim - 2 * count * len(grid)))
    return table.float().to(device)
