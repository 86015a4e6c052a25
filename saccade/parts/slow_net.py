"""Networks of coordinates that make the weights of other networks."""

from __future__ import annotations

from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.pooling import adaptive_mean
from saccade.ops.sizes import larger
from saccade.ops.tables import table
from saccade.parts.position import resample


@table
def coordinates(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(*grid, rank) places, from -1 to 1 on each axis."""
    # Not linspace, which would fix a symbolic side for good.
    steps = [2 / larger(side - 1, 1) for side in grid]
    axes: list[Tensor] = [torch.arange(side, device=device, dtype=dtype) * step - 1
                          for side, step in zip(grid, steps, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


class SlowNet(nn.Module):
    """W = out(o_n), o_0 = f_0(c), o_l = f_l(c) * linear_l(o_{l-1}) + plane, f_l(c) = sin(linear(c)): (*grid, dim).

    `plane` belongs to the native grid. Frequencies start at `omega` times a Gamma that narrows from layer to layer.
    """

    undecayed = ("plane",)

    def __init__(self, grid: tuple[int, ...], dim: int, hidden: int, layers: int, omega: float = 10.0) -> None:
        super().__init__()
        self.waves = nn.ModuleList(nn.Linear(len(grid), hidden) for _ in range(layers + 1))
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.plane = nn.Parameter(torch.zeros(grid))
        self.out = nn.Linear(hidden, dim)
        gamma = torch.distributions.Gamma(6 / (layers + 1), 1.0, validate_args=False)
        with torch.no_grad():
            wave: Any
            layer: Any
            for wave in self.waves:
                wave.weight.mul_(2 * pi * omega * gamma.sample((hidden, 1)).to(wave.weight.device))
                nn.init.zeros_(wave.bias)
            for layer in self.layers:
                nn.init.ones_(layer.bias)
            self.out.weight.mul_(self.plane.numel() ** -0.5)

    def forward(self, grid: tuple[int, ...], seen: Tensor | None = None) -> Tensor:
        places = coordinates(tuple(grid), self.plane.device, self.plane.dtype)
        plane = resample(self.plane[None, ..., None], grid)[0]
        hidden = torch.sin(self.waves[0](places))
        for number, layer in enumerate(self.layers):
            hidden = self.adjust(torch.sin(self.waves[number + 1](places)) * layer(hidden) + plane, number, seen)
        return self.out(hidden)

    def adjust(self, hidden: Tensor, number: int, seen: Tensor | None) -> Tensor:
        """What happens to the hidden map after each layer: nothing here."""
        return hidden

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The plane of another native grid."""
        return resample(value[None, ..., None], tuple(self.plane.shape))[0, ..., 0]

    def cost(self, grid: tuple[int, ...]) -> int:
        """Multiply-adds of one kernel, for the whole batch."""
        layers: list[Any] = [self.out, *self.waves, *self.layers]
        return torch.Size(grid).numel() * sum(layer.weight.numel() for layer in layers)


class ContextSlowNet(SlowNet):
    """A local kernel (k, k, dim) that also depends on the mean image: hidden maps are scaled by what a map holds.

    Each layer's result o becomes stop(o) + 0.1 o / |o|_2 (the norm over the kernel's places), times linear(g),
    g = gelu(linear(mean over the batch of reduce(pooled to k x k))).
    """

    def __init__(self, kernel: int, dim: int, hidden: int, layers: int, omega: float = 10.0) -> None:
        super().__init__((kernel, kernel), dim, hidden, layers, omega)
        self.kernel = kernel
        self.reduce = nn.Linear(dim, hidden)
        self.context = nn.Linear(hidden, hidden)
        self.factors = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        seen = F.gelu(self.context(self.reduce(adaptive_mean(x, (self.kernel,) * 2)).mean(0)))
        return super().forward((self.kernel,) * 2, seen)

    def adjust(self, hidden: Tensor, number: int, seen: Tensor | None) -> Tensor:
        length = hidden.flatten(0, 1).norm(dim=0).clamp(min=1e-12)
        return (hidden.detach() + 0.1 * hidden / length) * self.factors[number](seen)
