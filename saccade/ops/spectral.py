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


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """y[i] = sum_t kernel[t] x[i - t], zeros around x, a channel by itself: (B, *grid, C) -> the same.

    kernel (*size, C) is no smaller than the grid, its negative t at the end of each axis as in a Fourier transform;
    from 2 side - 1 places an axis on, all offsets are apart. In float32 at least. Time grows as N log N.
    """
    out = convolve_last(x.movedim(-1, 1).contiguous(), kernel.movedim(-1, 0).contiguous(), x.ndim - 2)
    return out.movedim(1, -1).contiguous()


def convolve_last(x: Tensor, kernel: Tensor, rank: int) -> Tensor:
    """`convolve` over the last `rank` axes of x (..., *grid) and kernel (..., *size); those before them broadcast."""
    grid, size = tuple(x.shape[-rank:]), tuple(kernel.shape[-rank:])
    precise = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfftn(kernel.to(precise), dim=tuple(range(-rank, 0)))
    # Axis by axis, so that no row of mere zeros is transformed and none that will be cropped.
    moved = torch.fft.rfft(x.to(precise), n=size[-1])
    for axis in range(-2, -rank - 1, -1):
        moved = torch.fft.fft(moved, n=size[axis], dim=axis)
    moved = moved * spectrum
    for axis in range(-rank, -1):
        moved = torch.fft.ifft(moved, dim=axis).narrow(axis, 0, grid[axis])
    return torch.fft.irfft(moved, n=size[-1]).narrow(-1, 0, grid[-1]).to(x.dtype)


def on_circle(kernel: Tensor) -> Tensor:
    """The one-sided kernel (*grid, C) of `convolve` with as many zeros behind it: (*(2 side), C)."""
    return F.pad(kernel, [0, 0, *(end for side in reversed(kernel.shape[:-1]) for end in (0, side))])


def turned(kernel: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A kernel of `convolve` that looks the other way along axes: t becomes -t."""
    return kernel.flip(axes).roll([1] * len(axes), axes) if axes else kernel
