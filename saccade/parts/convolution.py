"""Convolutions on the token grid: (B, *grid, C) -> (B, *grid', C').

(B, H, W, C) in memory is a channels-last (B, C, H, W): a convolution gets its fastest layout without a copy, both ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.parts.norm import BatchNorm

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AVERAGES: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
FAR, NEAR = 6, 3  # padding of a dilated depthwise convolution beyond which CPUs are slow; one that is fast


def on_grid(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a channels-first layer to a grid of tokens, in place of its memory: (B, *grid, C) -> (B, *grid', C')."""
    return layer(x.movedim(-1, 1)).movedim(1, -1).contiguous()  # a no-op but for layouts that torch chose otherwise


class _OnGrid(nn.Module):
    groups: int
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        known = all(isinstance(side, int) for side in x.shape)
        if known and x.is_cpu and not torch.compiler.is_compiling() and _padded_far(self):
            return _convolve_padded(x, self)
        image = x.movedim(-1, 1)
        if known and self.groups == 1 and self.weight.numel() > x.numel():
            # Channels-last kernels are copied on each call: where they outweigh the map, the map is the smaller copy.
            image = image.contiguous()
        return super().forward(image).movedim(1, -1).contiguous()


def _padded_far(layer: Any) -> bool:
    """Whether it is a depthwise convolution with holes whose padding a CPU has no fast kernel for."""
    return (min(layer.dilation) > 1 and layer.groups == layer.in_channels == layer.out_channels
            and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and min(layer.padding) > FAR)


def _convolve_padded(x: Tensor, layer: Any) -> Tensor:
    """The layer's convolution, most of the zeros laid around the map beforehand: VAN's 7x7 with dilation 3 takes a
    seventh of the time so."""
    ends = [size - NEAR for size in reversed(layer.padding) for _ in range(2)]
    image = F.pad(x, (0, 0, *ends)).movedim(-1, 1)
    convolve = CONVOLVE[x.ndim - 2]
    out: Tensor = convolve(image, layer.weight, layer.bias, layer.stride, NEAR, layer.dilation, layer.groups)
    return out.movedim(1, -1).contiguous()


class GridConv1d(_OnGrid, nn.Conv1d):
    """`nn.Conv1d` on (B, N, C)."""


class GridConv2d(_OnGrid, nn.Conv2d):
    """`nn.Conv2d` on (B, H, W, C)."""


class GridConv3d(_OnGrid, nn.Conv3d):
    """`nn.Conv3d` on (B, D, H, W, C)."""


GRID_CONVOLUTIONS: dict[int, Any] = {1: GridConv1d, 2: GridConv2d, 3: GridConv3d}


class AveragePool(nn.Module):
    """The mean over windows, with the options of `nn.AvgPool2d`: (B, *grid, C) -> (B, *grid', C), any rank."""

    def __init__(self, kernel: int, stride: int, padding: int = 0, **options: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.options = kernel, stride, padding, options

    def forward(self, x: Tensor) -> Tensor:
        image = x.movedim(-1, 1)
        if x.is_cuda and self.padding:
            # On a GPU the gradient of a padded pooling is wrong in this layout (pytorch/pytorch#188344).
            image = image.contiguous()
        pooled: Tensor = AVERAGES[x.ndim - 2](image, self.kernel, self.stride, self.padding, **self.options)
        return pooled.movedim(1, -1).contiguous()

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.kernel}, stride={self.stride}, padding={self.padding}{options}"


def at_least(x: Tensor, side: int, first: int) -> Tensor:
    """Zero-pad the end of the axes `first`, ... (all but the channels) that are shorter than `side`.

    Symbolic sides are taken to be long enough: asking would put a guard on them.
    """
    sides = x.shape[first : first + x.ndim - 2]
    amounts = [max(0, side - size) if isinstance(size, int) else 0 for size in sides]
    if not any(amounts):
        return x
    ends = [end for amount in reversed(amounts) for end in (0, amount)]
    return F.pad(x, ends if first == 2 else [0, 0, *ends])


def grid_conv(rank: int, dim: int, out_dim: int, kernel: int, **options: Any) -> nn.Module:
    """A convolution of a rank on grids of tokens; its parameters are those of `nn.Conv{rank}d`."""
    layer: nn.Module = GRID_CONVOLUTIONS[rank](dim, out_dim, kernel, **options)
    return layer


def depthwise(rank: int, dim: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Module:
    """A depthwise convolution that keeps the grid (odd kernels)."""
    padding = dilation * (kernel - 1) // 2
    return grid_conv(rank, dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, bias=bias)


def conv_norm(
    rank: int, dim: int, out_dim: int, kernel: int = 3, stride: int | tuple[int, ...] = 1, groups: int = 1,
    bias: bool = False,
) -> list[nn.Module]:
    """A convolution (an odd kernel keeps the grid, up to the stride) and a batch norm, for an `nn.Sequential`."""
    padding = kernel // 2
    return [grid_conv(rank, dim, out_dim, kernel, stride=stride, padding=padding, groups=groups, bias=bias),
            BatchNorm(out_dim)]
