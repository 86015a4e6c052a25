"""Squeeze and excitation: channels weighed by what the whole map holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def divisible(width: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to a width, at least `divisor`, and not under nine tenths of the width.

    (Howard et al., MobileNets, 2017, and every mobile network's code since.)
    """
    near = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * width else near


class SqueezeExcite(nn.Module):
    """x * gate(fc2(act(fc1(mean(x))))), the mean over the grid: (B, *grid, C) -> (B, *grid, C).

    (Hu et al., "Squeeze-and-Excitation Networks", 2018, section 3.)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = activation()
        self.fc2 = nn.Linear(hidden, dim)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(self.fc2(self.activation(self.fc1(x.flatten(1, -2).mean(1)))))
        return x * weights.view(x.shape[0], *[1] * (x.ndim - 2), -1)
