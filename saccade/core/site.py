"""Where a token mixer stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Site:
    """What a token mixer may know of its place: alternating shift, dilation a block and top-k a stage follow from it.

    `index` counts blocks within the stage, `stride` is in pixels of the image, and `grid` is the native grid, the one
    at the model's `img_size`: a mixer must run on any other, but sizes its tables by this one.
    """

    dim: int
    heads: int = 1
    stage: int = 0
    index: int = 0
    stride: int = 1
    grid: tuple[int, ...] = (14, 14)

    @property
    def rank(self) -> int:
        """Number of grid axes: 1 for sequences, 2 for images, 3 for video and volumes."""
        return len(self.grid)


MixerFactory = Callable[[Site], nn.Module]
