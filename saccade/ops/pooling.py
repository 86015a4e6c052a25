"""Pooling on the token grid (B, *grid, C)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

_ADAPTIVE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def adaptive_mean(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) -> (B, *size, C): the means of cells that cover the grid, cell i of n from floor(i S / n) to
    ceil((i + 1) S / n), so that neighbours share a token where n does not divide the side S.
    """
    return _ADAPTIVE[len(size)](x.movedim(-1, 1), size).movedim(1, -1)
