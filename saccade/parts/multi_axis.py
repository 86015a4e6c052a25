"""Gated MLPs over blocks and grids of fixed sides: the spatial mixing of MAXIM (Tu et al., 2022, section 3.2)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from saccade.ops.window import crop, merge, pad_to_multiple, partition


def tanh_gelu() -> nn.GELU:
    """JAX's default GELU."""
    return nn.GELU(approximate="tanh")


def norm(dim: int) -> nn.LayerNorm:
    """Flax's default layer norm."""
    return nn.LayerNorm(dim, eps=1e-6)


class BlockMix(nn.Linear):
    """A linear layer over the tokens of each block: (B, *grid, C) -> (B, *grid, C), sides multiples of the block's."""

    def __init__(self, sides: tuple[int, ...], bias: float = 0.0) -> None:
        super().__init__(prod(sides), prod(sides))
        self.sides = sides
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        blocks = partition(x, self.sides)
        return merge(super().forward(blocks.mT).mT.contiguous(), self.sides, tuple(x.shape[1:-1]))


class GridMix(BlockMix):
    """A linear layer over the tokens at one place of all cells of a grid: (B, *grid, C) -> (B, *grid, C)."""

    def forward(self, x: Tensor) -> Tensor:
        cell = tuple(size // side for size, side in zip(x.shape[1:-1], self.sides, strict=True))
        cells = partition(x, cell).unflatten(0, (-1, self.in_features)).movedim(1, -1)  # (B, cell, C, G)
        mixed = nn.Linear.forward(self, cells).movedim(-1, 1).flatten(0, 1).contiguous()
        return merge(mixed, cell, tuple(x.shape[1:-1]))


class Gmlp(nn.Module):
    """x + fc2(u * (mix(norm(v)) + 1)), u and v the halves of gelu(fc1(norm(x))): (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, dim: int, mix: nn.Module) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.activation = tanh_gelu()
        self.gate_norm = norm(dim)
        self.mix = mix
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.activation(self.fc1(self.norm(x))).chunk(2, -1)
        return x + self.fc2(u * (self.mix(self.gate_norm(v)) + 1))


class TwoAxes(nn.Module):
    """fc2([global(u), local(v)]), u and v the halves of gelu(fc1(norm(x))), on whole blocks and cells."""

    def __init__(self, dim: int, whole: nn.Module, local: nn.Module, multiple: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.activation = tanh_gelu()
        self.whole, self.local, self.multiple = whole, local, multiple
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_to_multiple(x, self.multiple)
        u, v = self.activation(self.fc1(self.norm(padded))).chunk(2, -1)
        out = self.fc2(torch.cat([self.whole(u), self.local(v)], -1))
        return crop(out, tuple(x.shape[1:-1])).contiguous()
