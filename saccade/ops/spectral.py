"""Filters in the frequency domain: a product of spectra is a circular convolution as wide as the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def spectrum_size(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of frequencies of a real map: the last axis keeps half of them and one."""
    return (*grid[:-1], grid[-1] // 2 + 1)


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """out = F^-1(weight * F(x)), F the orthonormal real Fourier transform over the grid: (B, *grid, C) -> the same.

    weight (*frequencies, C, 2), real and imaginary parts on a grid of frequencies; one from another grid is resampled
    (linearly, corners aligned) to that of x. In float32 at least: half precision has no transform on every device.
    (Rao et al., "Global Filter Networks for Image Classification", 2021, section 3.2.)
    """
    grid = tuple(x.shape[1:-1])
    axes = tuple(range(1, x.ndim - 1))
    precise = torch.promote_types(x.dtype, torch.float32)
    filters = torch.view_as_complex(resample_spectrum(weight.to(precise), spectrum_size(grid)).contiguous())
    out = torch.fft.irfftn(torch.fft.rfftn(x.to(precise), dim=axes, norm="ortho") * filters, s=grid, dim=axes,
                           norm="ortho")
    return out.to(x.dtype)


def resample_spectrum(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """(*frequencies, C, 2) -> (*size, C, 2), linear, corners aligned."""
    if all(isinstance(side, int) for side in size) and tuple(weight.shape[:-2]) == size:
        return weight
    flat = weight.flatten(-2).movedim(-1, 0)[None]
    flat = F.interpolate(flat, size=size, mode=MODES[len(size)], align_corners=True)
    return flat[0].movedim(0, -1).unflatten(-1, (-1, 2))
