"""Norms on the token grid (B, *grid, C); `nn.LayerNorm` needs none of this."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm1(nn.GroupNorm):
    """GroupNorm with one group: mean and variance of an image over its whole map and all channels."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        # One group makes the order of axes irrelevant: normalise the flat map, then scale the last axis.
        flat = F.layer_norm(x, x.shape[1:], eps=self.eps)
        return flat * self.weight + self.bias


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the channels of (B, *grid, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)
