"""Non-overlapping windows of a grid, of any rank: (B, *grid, C) <-> (B x windows, tokens a window, C)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.tables import table


def partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) -> (B x windows, prod(window), C); the grid is a multiple of the window."""
    sides = [side for size, part in zip(x.shape[1:-1], window, strict=True) for side in (size // part, part)]
    rank = len(window)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    x = x.view(x.shape[0], *sides, x.shape[-1]).permute(order)
    # A clone with a stated layout, not reshape: export then does not bake in when a copy was needed.
    return x.clone(memory_format=torch.contiguous_format).flatten(rank + 1, 2 * rank).flatten(0, rank)


def merge(windows: Tensor, window: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Undo `partition`: (B x windows, prod(window), C) -> (B, *grid, C)."""
    rank = len(window)
    counts = [size // part for size, part in zip(grid, window, strict=True)]
    x = windows.view(-1, *counts, *window, windows.shape[-1])
    order = [axis for number in range(1, rank + 1) for axis in (number, number + rank)]
    x = x.permute(0, *order, 2 * rank + 1).clone(memory_format=torch.contiguous_format)
    return x.view(-1, *grid, windows.shape[-1])


def shifted(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) with every token moved so many steps along each axis, around its end."""
    if all(isinstance(step, int) for step in steps):
        return x.roll(steps, tuple(range(1, x.ndim - 1)))
    for axis, step in enumerate(steps, 1):  # ONNX has no roll by a number that export leaves open
        size = x.shape[axis]
        place = torch.arange(size, device=x.device) - step
        place = torch.where(place < 0, place + size, place)
        x = x.index_select(axis, torch.where(place < size, place, place - size))
    return x


def crop(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The first `grid` tokens of each axis, without a slice (a negative pad exports with free sizes)."""
    return pad_end(x, [size - full for size, full in zip(grid, x.shape[1:-1], strict=True)])


def pad_to_multiple(x: Tensor, multiple: tuple[int, ...]) -> Tensor:
    """Zero-pad the end of each grid axis of (B, *grid, C) to a whole multiple."""
    return pad_end(x, [(-size) % part for size, part in zip(x.shape[1:-1], multiple, strict=True)])


def pad_end(x: Tensor, amounts: list[int]) -> Tensor:
    """Zero-pad (crop, where negative) the end of each grid axis of (B, *grid, C)."""
    return pad_ends(x, [(0, amount) for amount in amounts])


def pad_ends(x: Tensor, ends: Sequence[tuple[int, int]]) -> Tensor:
    """Zero-pad (crop, where negative) both ends of each grid axis of (B, *grid, C)."""
    if all(isinstance(end, int) and end == 0 for pair in ends for end in pair):
        return x
    return F.pad(x, [0, 0, *(end for pair in reversed(ends) for end in pair)])


@table
def relative_position_index(window: tuple[int, ...], device: torch.device) -> Tensor:
    """(N, N) rows of a bias table of prod(2 w - 1) entries: the offset query - key of each pair of tokens."""
    axes = torch.meshgrid([torch.arange(side, device=device) for side in window], indexing="ij")
    index = torch.zeros(1, dtype=torch.long, device=device)
    for side, axis in zip(window, axes, strict=True):
        place = axis.flatten()
        index = index * (2 * side - 1) + (place[:, None] - place[None, :] + side - 1)
    return index


@table
def window_tokens(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
    padded: tuple[int, ...] | None = None,
) -> Tensor:
    """(windows, N) number of the token at each place of each window of the padded, shifted grid; -1 for padding.

    The grid is padded at its ends to whole windows, unless `padded` says to what.
    """
    padded = padded or tuple(side + (-side) % part for side, part in zip(grid, window, strict=True))
    numbers = torch.arange(torch.Size(grid).numel(), device=device).view(1, *grid, 1) + 1
    numbers = pad_end(numbers, [full - side for full, side in zip(padded, grid, strict=True)]) - 1
    numbers = numbers.roll([-step for step in shift], tuple(range(1, len(grid) + 1)))
    return partition(numbers, window).squeeze(-1)
