"""Matrices whose entry depends on the offset key - query of two tokens alone, an offset an axis of the grid.

A table of offsets (heads, *(2 side - 1)) holds the offset 0 in its middle.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.record import Where
from saccade.ops.attend import attend, in_parts
from saccade.ops.spectral import convolve_last
from saccade.ops.tables import table

WHOLE = 2**20  # entries of a matrix that are computed at once where no gradient is taken: what stays in the cache


def attend_at_offsets(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, grid: tuple[int, ...], *, where: Where | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + b[j - i]) v among all N tokens of a grid: `attend` with a bias an offset.

    q, k, v (B, h, N, d), offsets (h, *(2 side - 1)). Evaluated for some queries at a time, so that the N x N bias is
    never held.
    """
    if not in_parts(*q.shape, *grid):
        return attend(q, k, v, toeplitz(offsets, grid), where=where, scale=scale)
    pieces = [attend(q[:, :, queries], k, v, toeplitz(offsets[:, part], grid), scale=scale)
              for queries, part in by_queries(grid, q.shape[1])]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


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


def by_queries(grid: tuple[int, ...], matrices: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a grid's first axis, as many as keep so many N x N `matrices` within WHOLE entries (one at least).

    Their tokens, and their part of a table's first axis: `toeplitz(offsets[:, part], grid)` are the rows of
    `toeplitz(offsets, grid)` at those tokens.
    """
    across = torch.Size(grid[1:]).numel()
    step = max(1, WHOLE // (matrices * across**2 * grid[0]))
    for first in range(0, grid[0], step):
        last = min(first + step, grid[0])
        yield slice(first * across, last * across), slice(grid[0] - last, 2 * grid[0] - 1 - first)


def toeplitz_product(offsets: Tensor, x: Tensor) -> Tensor:
    """y[..., i] = sum_j offsets[j - i] x[..., j] by Fourier transforms, in N log N: offsets (heads, *(2 side - 1)).

    x (B, heads, *others, *grid) -> the same.
    """
    rank = offsets.ndim - 1
    kernel = offsets.flip(tuple(range(1, rank + 1)))  # by query - key, and then those of 0 and more first
    for axis, side in enumerate(x.shape[-rank:], start=1):
        ahead = F.pad(kernel.movedim(axis, -1).narrow(-1, side - 1, side), (0, 1)).movedim(-1, axis)
        kernel = torch.cat([ahead, kernel.narrow(axis, 0, side - 1)], axis)
    return convolve_last(x, kernel.view(-1, *[1] * (x.ndim - 2 - rank), *kernel.shape[1:]), rank)
