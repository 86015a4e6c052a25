"""A matrix product along one axis of a map."""

from __future__ import annotations

import torch
from torch import Tensor


def along(axis: int, matrix: Tensor, x: Tensor) -> Tensor:
    """(B, ..., m, ..., C) -> (B, ..., n, ..., C): the matrix (n, m) times each line of x along `axis`."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    lines = x.flatten(0, axis - 1).flatten(2)
    # Not `@`: it asks whether a side is 1, which export would fix for good.
    return torch.bmm(matrix.expand(lines.shape[0], -1, -1), lines).view(*before, matrix.shape[0], *after)
