"""Inverted residuals: wide depthwise convolutions between narrow maps, in the two forms that papers build on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.parts.block import residual_tail
from saccade.parts.convolution import AveragePool, conv_norm, grid_conv
from saccade.parts.mlp import Gelu
from saccade.parts.norm import BatchNorm
from saccade.parts.squeeze import SqueezeExcite

Make = Callable[[], nn.Module]


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero-pad the grid of (B, *grid, C) so that a window of `kernel` at `stride` gives ceil(grid / stride) places.

    TensorFlow's "same": where the total is odd the end gets more, so an even side is padded at its end alone when a
    kernel of 3 strides by 2. `kernel` is at least `stride`.
    """
    # Written so that export simplifies the padded side, which nests from stage to stage.
    totals = [((side + stride - 1) // stride - 1) * stride + kernel - side for side in x.shape[1:-1]]
    if all(isinstance(total, int) and total == 0 for total in totals):
        return x
    return F.pad(x, [0, 0, *(part for total in reversed(totals) for part in (total // 2, total - total // 2))])


class SamePool(nn.Module):
    """The mean over windows of `kernel` at stride 2, padded as `pad_same` does and padding not counted."""

    def __init__(self, kernel: int = 2) -> None:
        super().__init__()
        self.kernel = kernel
        self.mean = AveragePool(kernel, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self._pool(x)
        if self.kernel == 2 and all(isinstance(side, int) and side % 2 == 0 for side in x.shape[1:-1]):
            return pooled
        return pooled / self._pool(x.new_ones(1, *x.shape[1:-1], 1))

    def _pool(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(pad_same(x, self.kernel, 2))
        return mean


class SameConv(nn.Module):
    """A convolution padded as `pad_same` does: (B, *grid, C) -> (B, *ceil(grid / stride), out)."""

    def __init__(
        self, rank: int, dim: int, out_dim: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        padding = kernel // 2 if stride == 1 else 0
        self.conv = grid_conv(rank, dim, out_dim, kernel, stride=stride, padding=padding, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.stride == 1 else pad_same(x, self.kernel, self.stride))


class MBConv(nn.Module):
    """x' + shrink(squeeze(act(norm(depthwise(act(norm(expand(norm(x)))))))): (B, *grid, C) -> (B, *grid', C').

    The form with a norm before: `expand` makes `ratio` C' channels, the depthwise 3x3 convolution strides, `shrink` has
    no norm; x' is x, pooled over windows of `pool` where it strides and projected where the width changes. `squeeze` is
    the width of squeeze and excitation as a share of C', 0 for none. Batch norms have eps 1e-3, padding is
    TensorFlow's. (Dai et al., "CoAtNet: Marrying Convolution and Attention for All Data Sizes", 2021, appendix A.1.)
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        out_dim: int,
        *,
        stride: int = 1,
        ratio: int = 4,
        squeeze: float = 0.25,
        pool: int = 2,
        activation: Make = Gelu,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden, norm = ratio * out_dim, partial(BatchNorm, eps=1e-3)
        self.pool = SamePool(pool) if stride == 2 else nn.Identity()
        self.project = nn.Linear(dim, out_dim) if dim != out_dim else nn.Identity()
        self.norm = norm(dim)
        self.expand = nn.Sequential(nn.Linear(dim, hidden, bias=False), norm(hidden), activation())
        depthwise = SameConv(rank, hidden, hidden, stride=stride, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, norm(hidden), activation())
        reduced = max(int(squeeze * out_dim), 1)
        self.squeeze = SqueezeExcite(hidden, reduced, activation=nn.SiLU) if squeeze else nn.Identity()
        self.shrink = nn.Linear(hidden, out_dim)
        self.tail = residual_tail(out_dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shrink(self.squeeze(self.depthwise(self.expand(self.norm(x)))))
        return self.project(self.pool(x)) + self.tail(out)


class InvertedResidual(nn.Module):
    """[x +] norm(shrink(act(norm(depthwise(act(norm(expand(x)))))))): (B, *grid, C) -> (B, *grid', C').

    The form with norms after: x is added where neither grid nor width changes. `expand` is left out where `hidden` is
    the input's width and `expand` is False.
    (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, section 3.)
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        out_dim: int,
        hidden: int,
        *,
        stride: int = 1,
        expand: bool = True,
        activation: Make = nn.ReLU6,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and dim == out_dim
        widen = [nn.Linear(dim, hidden, bias=False), BatchNorm(hidden), activation()] if expand else []
        self.expand = nn.Sequential(*widen)
        local = conv_norm(rank, hidden, hidden, stride=stride, groups=hidden)
        self.depthwise = nn.Sequential(*local, activation())
        self.shrink = nn.Sequential(nn.Linear(hidden, out_dim, bias=False), BatchNorm(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.shrink(self.depthwise(self.expand(x)))
        return x + out if self.residual else out
