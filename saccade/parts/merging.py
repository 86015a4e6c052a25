"""Between stages: patch merging (Swin and its kin) and convolutions with stride (PVT v2 and its kin)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.ops.window import pad_to_multiple
from saccade.parts.convolution import at_least, grid_conv


class PatchMerging(nn.Module):
    """reduction(norm(the 2x2 neighbours, joined)): (B, *grid, C) -> (B, *ceil(grid / 2), out).

    The neighbours are joined with the first axis fastest: (0, 0), (1, 0), (0, 1), (1, 1). Odd sides are zero-padded.
    (Liu et al., Swin, 2021, section 3.1.)
    """

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim * 2**rank)
        self.reduction = nn.Linear(dim * 2**rank, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rank = x.ndim - 2
        x = pad_to_multiple(x, (2,) * rank)
        halves = [part for side in x.shape[1:-1] for part in (side // 2, 2)]
        x = x.view(x.shape[0], *halves, x.shape[-1])
        order = [0, *range(1, 2 * rank, 2), *range(2 * rank, 1, -2), 2 * rank + 1]
        x = x.permute(order).clone(memory_format=torch.contiguous_format).flatten(rank + 1)
        return self.reduction(self.norm(x))


class ConvMerging(nn.Sequential):
    """norm(convolution of stride 2): (B, *grid, C) -> (B, *ceil(grid / 2), out), overlapping patches for a kernel of 3.

    Sides shorter than the kernel are zero-padded.
    (Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", 2022, section 3.2.)
    """

    def __init__(
        self, rank: int, dim: int, out_dim: int, kernel: int = 3, norm: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        padding = (kernel - 1) // 2
        super().__init__(grid_conv(rank, dim, out_dim, kernel, stride=2, padding=padding), norm(out_dim))
        self.least = kernel - 2 * padding

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least(x, self.least, first=1))


class NormedMerging(nn.Sequential):
    """A 2x2 convolution of stride 2 on norm(x): (B, *grid, C) -> (B, *floor(grid / 2), out), patches side by side.

    A last odd row or column is left out, as the convolution does; a side of one token is zero-padded to two.
    (Liu et al., "A ConvNet for the 2020s", 2022, section 2.6.)
    """

    def __init__(
        self, rank: int, dim: int, out_dim: int, norm: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__(norm(dim), grid_conv(rank, dim, out_dim, 2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least(x, 2, first=1))
