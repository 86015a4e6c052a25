"""Grids of tokens with prefix (class, register) tokens before them, as one sequence and back."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from saccade.ops.tables import table

MOST_PREFIX_TOKENS = 16


def join(x: Tensor, prefix: Tensor | None) -> Tensor:
    """(B, *grid, C) and (B, P, C) -> (B, P + N, C); without a prefix, (B, N, C)."""
    tokens = x.flatten(1, -2)
    return tokens if prefix is None else torch.cat([prefix, tokens], 1)


@overload
def split(tokens: Tensor, x: Tensor, prefix: None) -> Tensor: ...


@overload
def split(tokens: Tensor, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def split(tokens: Tensor, x: Tensor, prefix: Tensor | None) -> Tensor | tuple[Tensor, Tensor]: ...


def split(tokens: Tensor, x: Tensor, prefix: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Undo `join`: a grid of the shape of `x`, and the prefix tokens where there were any."""
    grid = (*x.shape[1:-1], tokens.shape[-1])
    if prefix is None:
        return tokens.unflatten(1, grid[:-1])
    count = prefix.shape[1]
    return tokens[:, count:].unflatten(1, grid[:-1]), tokens[:, :count]


@table
def token_numbers(count: int, device: torch.device) -> Tensor:
    """0, 1, ..., count - 1 as one group (1, count)."""
    return torch.arange(count, device=device)[None]


def global_tokens(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`where` of an attention of all tokens to all tokens."""
    numbers = token_numbers(count, device)
    return numbers, numbers


@table
def causal(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A bias (N, N) of scores: -inf where the key comes after the query."""
    return torch.full((count, count), -torch.inf, device=device, dtype=dtype).triu(1)


@table
def strided_tokens(
    grid: tuple[int, ...], reduced: tuple[int, ...], stride: int, prefix: int, device: torch.device
) -> Tensor:
    """(1, P + M) token that each key of a map thinned by `stride` is centred on, after `prefix` tokens of their own."""
    numbers = torch.zeros(1, dtype=torch.long, device=device)
    for side, keys in zip(grid, reduced, strict=True):
        place = (torch.arange(keys, device=device) * stride + (stride - 1) // 2).clamp(max=side - 1)
        numbers = (numbers[:, None] * side + place).flatten()
    return torch.cat([torch.arange(prefix, device=device), numbers + prefix])[None]


def token_grid(tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]] | None:
    """Prefix tokens and grid (h, w) of a sequence over a picture: the fewest prefix tokens that leave whole rows.

    A grid has ceil(height / s) x ceil(width / s) tokens for a stride s. None where no stride fits.
    """
    strides = range(1, min(height, width) + 1)
    grids = {(-(-height // stride), -(-width // stride)) for stride in strides}
    for prefix in range(MOST_PREFIX_TOKENS + 1):
        for grid in grids:
            if grid[0] * grid[1] == tokens - prefix and tokens - prefix > 1:
                return prefix, grid
    return None
