"""Pooling on the token grid (B, *grid, C)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.product import along

_ADAPTIVE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def adaptive_mean(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) -> (B, *size, C): the means of cells that cover the grid, cell i of n from floor(i S / n) to
    ceil((i + 1) S / n), so that neighbours share a token where n does not divide the side S.
    """
    if not torch.compiler.is_compiling():
        return _ADAPTIVE[len(size)](x.movedim(-1, 1), size).movedim(1, -1)
    for axis, count in enumerate(size, 1):  # as products: PyTorch's own form does not survive ONNX at another size
        x = along(axis, _cells(x.shape[axis], count, x.device).to(x.dtype), x)
    return x


def _cells(side: int, count: int, device: torch.device) -> Tensor:
    """(count, side): what each token of an axis gives to each cell."""
    place, cell = torch.arange(side, device=device), torch.arange(count, device=device)[:, None]
    start, end = cell * side // count, ((cell + 1) * side + count - 1) // count
    return ((place >= start) & (place < end)) / (end - start)
