"""The channel mixers that papers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Gelu(nn.Module):
    """x Phi(x), on a hidden state that nobody else holds: in place where no gradient is taken.

    A fresh tensor of a wide hidden layer costs more in page faults than the arithmetic (a fifth of ConvNeXt's first
    stage).
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.gelu(hidden)
        return torch.ops.aten.gelu_(hidden)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """fc2(act(fc1(x))) on the last axis: (B, *grid, C) -> (B, *grid, C), hidden width `ratio` C."""

    def __init__(
        self, dim: int, ratio: float = 4.0, activation: Callable[[], nn.Module] = Gelu, bias: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio), bias=bias)
        self.activation = activation()
        self.fc2 = nn.Linear(int(dim * ratio), dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]
