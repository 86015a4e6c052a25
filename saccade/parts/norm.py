"""Norms on the token grid (B, *grid, C); `nn.LayerNorm` needs none of this."""

from __future__ import annotations

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
