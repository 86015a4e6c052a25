"""The discrete cosine transform of a map: its low frequencies, and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor

from saccade.ops.precision import full_precision
from saccade.ops.product import along
from saccade.ops.tables import table


def cosine_transform(x: Tensor, kept: Sequence[int]) -> Tensor:
    """(B, *grid, C) -> (B, *kept, C), the lowest `kept` frequencies of each axis, channel by channel.

    Orthonormal DCT-II, F = D_H X D_W^T with D[u, x] = a(u) cos(pi / H (x + 1/2) u), a(0) = sqrt(1 / H), else
    sqrt(2 / H): rows that are not kept are never multiplied. In float32 at least, under autocast too.
    """
    return _along_axes(x, list(enumerate(kept, 1)), forth=True)


def inverse_cosine_transform(coefficients: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, *kept, C) -> (B, *grid, C): undo `cosine_transform`; frequencies beyond `kept` count as zeros."""
    return _along_axes(coefficients, list(enumerate(grid, 1))[::-1], forth=False)


def _along_axes(x: Tensor, sides: list[tuple[int, int]], forth: bool) -> Tensor:
    """The axes one by one, each to its new side, so that a long side is long in as few products as can be."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with full_precision(x):
        for axis, side in sides:
            if forth:
                basis = cosine_basis(x.shape[axis], side, x.dtype, x.device)
            else:
                basis = cosine_basis(side, x.shape[axis], x.dtype, x.device).T
            x = along(axis, basis, x)
    return x


@table
def cosine_basis(side: int, kept: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(kept, side): the first rows of the orthonormal DCT-II matrix."""
    place = torch.arange(side, dtype=torch.float64, device=device) + 0.5
    frequency = torch.arange(kept, dtype=torch.float64, device=device)[:, None]
    rows = (pi / side * frequency * place).cos() * (2 / side) ** 0.5
    return torch.where(frequency == 0, rows * 0.5**0.5, rows).to(dtype)
