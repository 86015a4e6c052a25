"""Rotary position: queries and keys turned by angles that grow with the token's number."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from saccade.ops.tables import table

Grid = tuple[int, ...]


def rotate(x: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of each token by its angles: (B, *grid, 2, heads, d) -> the same."""
    pairs = x.unflatten(-1, (-1, 2))
    turn = rotation(tuple(x.shape[1:-3]), x.shape[-1] // 2, x.device, x.dtype)
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        # One product of complex numbers takes a quarter of the time of the six passes below.
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@table
def rotation(grid: Grid, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(*grid, 1, 1, pairs, 2) cosine and sine of n 10000^(-i / (pairs - 1)) for the i-th pair of the n-th token.

    (Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, section 2.1.)
    """
    angle = torch.arange(prod(grid), device=device)[:, None] * 10000 ** -torch.linspace(0, 1, pairs, device=device)
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype).view(*grid, 1, 1, pairs, 2)


def rotate_halves(x: Tensor, channels: int, base: float = 10000.0) -> Tensor:
    """Turn channel i with channel i + channels / 2 by the token's angle, of the first `channels`: (..., N, d).

    (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, in the layout of GPT-NeoX and
    LLaMA.)
    """
    cos, sin = half_rotation(x.shape[-2], channels // 2, base, x.device, x.dtype)
    a, b, rest = x.split([channels // 2, channels // 2, x.shape[-1] - channels], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@table
def half_rotation(
    count: int, pairs: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, pairs) of n base^(-i / pairs)."""
    rates = base ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    angle = torch.arange(count, device=device)[:, None] * rates
    return angle.cos().to(dtype), angle.sin().to(dtype)
