"""Restormer's two halves of a block: channels that attend to channels, and a gated depthwise convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.parts.convolution import depthwise


class TransposedAttention(nn.Module):
    """out = proj(f(t q k^T) v), q and k (d, N) with rows of length 1: (B, H, W, C) -> the same.

    q, k, v are a 1x1 and a depthwise 3x3 convolution of x; each head's d channels look at each other over all N pixels,
    so that the cost is linear in N. t is learned, one a head; f is the softmax over keys unless given. With `tile`,
    evaluation attends inside tiles of that side that cover the map evenly, overlapping, and takes the mean where they
    overlap: as large as the pictures of training. (Zamir et al., "Restormer", 2022, section 3.1; Chu et al., "Improving
    Image Restoration by Revisiting Global Information Aggregation", 2022.)
    """

    def __init__(
        self, dim: int, heads: int, bias: bool = False, f: Callable[[Tensor], Tensor] | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.f, self.tile = heads, f, tile
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.local = depthwise(2, 3 * dim, 3, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.local(self.qkv(x))
        return self.proj(self.mixed(qkv) if self.training or self.tile is None else self.tiled(qkv, self.tile))

    def mixed(self, qkv: Tensor) -> Tensor:
        """f(t q k^T) v of all pixels: (B, H, W, 3 C) -> (B, H, W, C)."""
        q, k, v = qkv.flatten(1, 2).mT.unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, d, N)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        weights = scores.softmax(-1) if self.f is None else self.f(scores)
        return (weights @ v).flatten(1, 2).mT.unflatten(1, qkv.shape[1:3])

    def tiled(self, qkv: Tensor, tile: int) -> Tensor:
        """The same inside tiles; a pixel has the mean of those it lies in."""
        (_, height, width, _), C = qkv.shape, self.proj.in_features
        total, count = qkv.new_zeros(*qkv.shape[:-1], C), qkv.new_zeros(height, width, 1)
        for top in starts(height, tile):
            for left in starts(width, tile):
                here = (slice(top, top + tile), slice(left, left + tile))
                total[:, here[0], here[1]] += self.mixed(qkv[:, here[0], here[1]])
                count[here] += 1
        return total / count


def starts(side: int, tile: int) -> list[int]:
    """Where tiles begin that cover a side: as few as can be, evenly apart (rounded up), the last at the end."""
    count = -(-side // tile)
    if count == 1:
        return [0]
    step = -(-(side - tile) // (count - 1))
    return [min(number * step, side - tile) for number in range(count)]


class GatedConvolution(nn.Module):
    """W_2 (gelu(a) * b), a and b the halves of dw(W_1 x): (B, H, W, C) -> the same. (Restormer, section 3.2.)"""

    def __init__(self, dim: int, ratio: float, bias: bool = False) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.conv = depthwise(2, 2 * hidden, 3, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, kept = self.conv(self.fc1(x)).chunk(2, -1)
        return self.fc2(F.gelu(gate) * kept)


# The names that Restormer's heirs give them.
TRANSPOSED: KeyMap = (
    (r"temperature", "temperature"),
    (r"qkv\.weight", "qkv.weight", matrix_from_1x1),
    (r"qkv\.bias", "qkv.bias"),
    (r"qkv_dwconv\.(.*)", r"local.\1"),
    (r"project_out\.weight", "proj.weight", matrix_from_1x1),
    (r"project_out\.bias", "proj.bias"),
)
GATED: KeyMap = (
    (r"project_in\.weight", "fc1.weight", matrix_from_1x1),
    (r"project_in\.bias", "fc1.bias"),
    (r"dwconv\.(.*)", r"conv.\1"),
    (r"project_out\.weight", "fc2.weight", matrix_from_1x1),
    (r"project_out\.bias", "fc2.bias"),
)
