"""Matrices whose entry depends on the offset key - query of two tokens alone, an offset an axis of the grid.

A table of offsets (heads, *(2 side - 1)) holds the offset 0 in its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.tables import table


@table
def offset_rows(side: int, native: int, device: torch.device) -> Tensor:
    """(2 side - 1,) rows of a table of 2 native - 1 offsets; what lies beyond takes the farthest."""
    return torch.arange(1 - side, side, device=device).clamp(1 - native, native - 1) + native - 1


def at_offsets(offsets: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A table (heads, *(2 native - 1)) as that of another grid, (heads, *(2 side - 1)): the nearest offset's entry."""
    for axis, side in enumerate(grid, start=1):
        native = (offsets.shape[axis] + 1) // 2
        if not (isinstance(side, int) and side == native):
            offsets = offsets.index_select(axis, offset_rows(side, native, offsets.device))
    return offsets


def toeplitz(offsets: Tensor, keys: tuple[int, ...]) -> Tensor:
    """(heads, *(queries + keys - 1)) -> (heads, prod(queries), prod(keys)), T[i, j] = offsets[j - i].

    The first query of an axis meets the keys in the last `keys` entries of that axis.
    """
    rank = len(keys)
    if all(isinstance(side, int) for side in keys):
        for axis, side in enumerate(keys, start=1):
            offsets = offsets.unfold(axis, side, 1)  # (heads, *queries, last one first, *keys)
        return offsets.flip(tuple(range(1, rank + 1))).flatten(rank + 1).flatten(1, rank)
    for axis, side in reversed(list(enumerate(keys, start=1))):  # unfold would fix sizes that export leaves open
        queries = offsets.shape[axis] - side + 1
        rows = pairs(queries, side, offsets.device).flatten()
        offsets = offsets.index_select(axis, rows).unflatten(axis, (queries, side))
    order = [*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    offsets = offsets.permute(0, *order).clone(memory_format=torch.contiguous_format)
    return offsets.flatten(rank + 1).flatten(1, rank)


def pairs(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) place of the offset of each pair along one axis."""
    return torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] + queries - 1
