"""Position tables that belong to a native grid and are resampled to the grid that comes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def resample(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(1, *native, C) -> (1, *grid, C): bicubic for images (linear for sequences, trilinear for volumes), no antialiasing,
    align_corners=False, as in DeiT's and Swin's own loading code.
    """
    if tuple(table.shape[1:-1]) == tuple(grid):
        return table
    mode = MODES[len(grid)]
    resized = F.interpolate(table.movedim(-1, 1).float(), size=grid, mode=mode, align_corners=False)
    return resized.movedim(1, -1).to(table.dtype)
