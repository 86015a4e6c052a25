"""A weighted sum over each token's neighbourhood, with weights that are given: what a dynamic convolution does."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from saccade.ops.tables import table


def neighborhood_sum(weights: Tensor, values: Tensor, kernel: int) -> Tensor:
    """out_i = sum over the k^n tokens j around i of weights_ij values_j; at borders the window moves inwards.

    weights (B, h, *S, k^n), neighbours in row-major order; values (B, *S, h, d), no side of S under k; out like values.
    No neighbourhood is copied: for each offset on the leading axes, the weights of a row of tokens are laid out over
    the whole row and multiply it as a matrix.
    """
    grid = tuple(weights.shape[2:-1])
    leading = len(grid) - 1
    weights = weights.unflatten(-1, (kernel,) * len(grid))
    values = values.movedim(-2, 1)
    places = [neighbours(side, kernel, weights.device) for side in grid]
    total: Tensor | None = None
    spread: Tensor | None = None
    for offsets in product(range(kernel), repeat=leading):
        rows = values
        for axis, offset in enumerate(offsets):
            rows = rows.index_select(2 + axis, places[axis][:, offset])
        at: Any = (..., *offsets, slice(None))
        part = weights[at]
        if spread is None or torch.is_grad_enabled():  # else its zeros serve again: all offsets write to one place
            spread = part.new_zeros(*part.shape[:-1], grid[-1])
        spread = spread.scatter_(-1, places[-1].expand(part.shape), part)
        total = spread @ rows if total is None else total + spread @ rows
    assert total is not None  # a kernel has at least one row
    return total.movedim(1, -2)


@table
def neighbours(size: int, kernel: int, device: torch.device) -> Tensor:
    """(size, kernel) the positions that each position of an axis looks at."""
    first = (torch.arange(size, device=device) - kernel // 2).clamp(min=0).clamp(max=size - kernel)
    return first[:, None] + torch.arange(kernel, device=device)


def neighborhood_bias(bias: Tensor, grid: tuple[int, ...], kernel: int) -> Tensor:
    """A bias a head and offset (h, *(2 k - 1)) for each token and neighbour: (h, *S, k^n), indexed by j - i + k - 1."""
    rank = len(grid)
    index: list[Any] = [slice(None)]
    for axis, side in enumerate(grid):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = side, kernel
        index.append(bias_index(side, kernel, bias.device).view(shape))
    return bias[tuple(index)].flatten(-rank)


@table
def bias_index(size: int, kernel: int, device: torch.device) -> Tensor:
    """(size, kernel) neighbour - position + kernel - 1 on an axis."""
    return neighbours(size, kernel, device) - torch.arange(size, device=device)[:, None] + kernel - 1
