"""Norms on the token grid (B, *grid, C); `nn.LayerNorm` needs none of this."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm1(nn.GroupNorm):
    """GroupNorm with one group: mean and variance of an image over its whole map and all channels."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the channels of (B, *grid, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class GlobalResponse(nn.Module):
    """(1 + gamma n) x + beta, n = |x|_2 over the grid, divided by its mean over the channels.

    (Woo et al., "ConvNeXt V2", 2023, section 3.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(dim))  # None once a layer behind it has taken it over

    def forward(self, x: Tensor) -> Tensor:
        norm = x.flatten(1, -2).square().sum(1).sqrt()
        share = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        scale = (1 + self.gamma * share).view(x.shape[0], *[1] * (x.ndim - 2), -1)
        return scale * x if self.beta is None else torch.addcmul(self.beta, scale, x)
