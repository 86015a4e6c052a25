"""From an image (B, C, *size) to a grid of tokens (B, *grid, C)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.parts.convolution import CONVOLUTIONS, at_least


class PatchEmbed(nn.Module):
    """A convolution with stride, then a norm: (B, C, *size) -> (B, *grid, dim).

    With kernel == stride (patches) the image is zero-padded at its end to whole patches, as Swin's dense-prediction
    code does; with `padding` (overlapping patches) it is the convolution's own.
    """

    def __init__(
        self,
        rank: int,
        in_chans: int,
        dim: int,
        *,
        stride: int = 4,
        kernel: int | None = None,
        padding: int = 0,
        norm: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.whole_patches = kernel is None
        self.least = (kernel or stride) - 2 * padding
        self.proj = CONVOLUTIONS[rank](in_chans, dim, kernel or stride, stride=stride, padding=padding, bias=bias)
        self.norm = norm(dim) if norm is not None else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        if self.whole_patches:
            image = pad_image(image, self.stride)
        else:
            image = at_least(image, self.least, first=2)
        return self.norm(self.proj(image).movedim(1, -1).contiguous())


class ConvStem(nn.Sequential):
    """Layers on grids, put on an image: (B, C, *size) -> (B, *grid, dim). Sides under `least` are zero-padded to it."""

    def __init__(self, *layers: nn.Module, least: int = 1) -> None:
        super().__init__(*layers)
        self.least = least

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(at_least(image, self.least, first=2).movedim(1, -1).contiguous())


def pad_image(image: Tensor, multiple: int) -> Tensor:
    """Zero-pad the end of each axis of (B, C, *size) to whole multiples."""
    amounts = [(-side) % multiple for side in image.shape[2:]]
    if all(isinstance(amount, int) and amount == 0 for amount in amounts):
        return image
    return F.pad(image, [side for amount in reversed(amounts) for side in (0, amount)])
