"""Mixers that no content steers: neighbours averaged, positions mixed by a matrix, nothing mixed."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.convolution import AveragePool
from saccade.parts.position import is_native, resample


class Pooling(nn.Module):
    """mean of the `kernel` x `kernel` neighbours inside the map, minus the token itself (the block adds it back)."""

    ranks = (1, 2, 3)
    template = Template("1 in the window", "divided by its sum", "sum of x, less x")

    def __init__(self, site: Site, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel
        self.mean = AveragePool(kernel, 1, kernel // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(x)
        return mean - x

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return 0

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


class SpatialFc(nn.Module):
    """out = W x over positions: y[i] = sum_j W[i, j] x[j], the same for every channel. W belongs to the native grid."""

    ranks = (1, 2)
    template = Template("w[i, j] of the place", "none", "sum of x")

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.grid = site.grid
        tokens = prod(site.grid)
        self.weight = nn.Parameter(torch.empty(tokens, tokens))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        weight = self.weight if is_native(grid, self.grid) else self._at(self.weight, self.grid, grid)
        return (weight @ x.flatten(1, -2)).view(x.shape)

    @staticmethod
    def _at(weight: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        columns = resample(weight.T.unflatten(0, native)[None], grid).flatten(1, -2)[0]  # (N', N_native)
        rows = resample(columns.T.unflatten(0, native)[None], grid).flatten(1, -2)[0]
        return rows * (prod(native) / prod(grid))

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The weight of a square grid of another side, for this grid."""
        side = round(value.shape[0] ** (1 / len(self.grid)))
        return self._at(value, (side,) * len(self.grid), self.grid)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return prod(grid) ** 2 * site.dim

    def reach(self, site: Site) -> None:
        return None


class Identity(nn.Identity):
    """No mixing at all: the lower bound that a mixer has to beat."""

    ranks = (1, 2, 3)
    template = Template("none: a token by itself", "none", "x")

    def __init__(self, site: Site) -> None:
        super().__init__()

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return 0

    def reach(self, site: Site) -> tuple[int, ...]:
        return (0,) * site.rank
