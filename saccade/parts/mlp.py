"""The channel mixers that papers share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(act(fc1(x))) on the last axis: (B, *grid, C) -> (B, *grid, C), hidden width `ratio` C."""

    def __init__(
        self, dim: int, ratio: float = 4.0, activation: Callable[[], nn.Module] = nn.GELU, bias: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio), bias=bias)
        self.activation = activation()
        self.fc2 = nn.Linear(int(dim * ratio), dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]
