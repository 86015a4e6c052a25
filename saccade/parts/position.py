"""Position tables that belong to a native grid and are resampled to the grid that comes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def is_native(grid: tuple[int, ...], native: tuple[int, ...]) -> bool:
    """Whether a table can be used as it is. A symbolic size never says yes: the question would fix it for good."""
    return all(isinstance(side, int) for side in grid) and tuple(grid) == tuple(native)


def resample(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(1, *native, C) -> (1, *grid, C): bicubic for images (linear for sequences, trilinear for volumes).

    No antialiasing, align_corners=False, as in DeiT's and Swin's own loading code.
    """
    if is_native(grid, tuple(table.shape[1:-1])):
        return table
    mode = MODES[len(grid)]
    resized = F.interpolate(table.movedim(-1, 1).float(), size=grid, mode=mode, align_corners=False)
    return resized.movedim(1, -1).to(table.dtype)
