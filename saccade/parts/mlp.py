"""The channel mixers that papers share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from saccade.parts.convolution import depthwise

WHOLE, PIECE = 2**21, 2048  # hidden numbers that are computed at once; else rows a piece (measured on a CPU)


class Gelu(nn.Module):
    """x Phi(x), on a hidden state that nobody else holds: in place where no gradient is taken.

    A fresh tensor of a wide hidden layer costs more in page faults than the arithmetic (a fifth of ConvNeXt's first
    stage).
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.gelu(hidden)
        return torch.ops.aten.gelu_(hidden)


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
        free = not all(isinstance(side, int) for side in x.shape)  # sizes that export leaves open cannot choose
        plain = free or torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu
        if plain or prod(x.shape[:-1]) * self.fc1.out_features <= WHOLE:
            return self.fc2(self.activation(self.fc1(x)))
        # The hidden state of a large map would leave the cache three times: take it in pieces that stay.
        out = x.new_empty(*x.shape[:-1], self.fc2.out_features)
        for here, piece in zip(out.flatten(0, -2).split(PIECE), x.flatten(0, -2).split(PIECE), strict=True):
            here.copy_(self.fc2(self.activation(self.fc1(piece))))
        return out


class ConvMlp(nn.Module):
    """fc2(act(conv(fc1(x)))), conv a 3x3 depthwise convolution on the hidden map: (B, *grid, C) -> (B, *grid, C).

    (Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", 2022, section 3.3.)
    """

    def __init__(
        self, rank: int, dim: int, ratio: float = 4.0, activation: Callable[[], nn.Module] = Gelu
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.local = depthwise(rank, hidden, 3)
        self.activation = activation()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.local(self.fc1(x))))


class LocalMlp(ConvMlp):
    """fc2(h + conv(h)), h = act(fc1(x)): the convolution stands after the activation, beside a shortcut.

    (Fan et al., "RMT: Retentive Networks Meet Vision Transformers", 2023, the authors' feed-forward network.)
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(x))
        return self.fc2(self.local(hidden) + hidden)


class EarlyLocalMlp(ConvMlp):
    """fc2(act(h + conv(h))), h = fc1(x): the convolution stands before the activation, beside a shortcut.

    (Lin et al., "Scale-Aware Modulation Meet Transformer", 2023; Zhu et al., GLNet, 2024.)
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(self.activation(hidden + self.local(hidden)))
