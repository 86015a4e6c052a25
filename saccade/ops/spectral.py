"""Filters in the frequency domain: a product of spectra is a circular convolution as wide as the map."""

from __future__ import annotations

from math import pi, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.product import along

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
    precise = torch.promote_types(x.dtype, torch.float32)
    filters = resample_spectrum(weight.to(precise), spectrum_size(grid))
    return inverse_fourier(complex_product(fourier(x.to(precise)), filters), grid).to(x.dtype)


def fourier(x: Tensor) -> Tensor:
    """(B, *grid, C) -> (B, *frequencies, C, 2): real and imaginary part of the orthonormal real Fourier transform."""
    if not torch.compiler.is_exporting():
        return torch.view_as_real(torch.fft.rfftn(x, dim=tuple(range(1, x.ndim - 1)), norm="ortho"))
    *others, last = range(1, x.ndim - 1)
    cos, sin = waves(x.shape[last], x.shape[last] // 2 + 1, x.dtype, x.device)
    real, imaginary = along(last, cos, x), -along(last, sin, x)
    for axis in others:
        cos, sin = waves(x.shape[axis], x.shape[axis], x.dtype, x.device)
        real, imaginary = (along(axis, cos, real) + along(axis, sin, imaginary),
                           along(axis, cos, imaginary) - along(axis, sin, real))
    return torch.stack([real, imaginary], -1)


def inverse_fourier(spectrum: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Undo `fourier`: (B, *frequencies, C, 2) -> (B, *grid, C)."""
    if not torch.compiler.is_exporting():
        axes = tuple(range(1, len(grid) + 1))
        return torch.fft.irfftn(torch.view_as_complex(spectrum), s=grid, dim=axes, norm="ortho")
    real, imaginary = spectrum.unbind(-1)
    *others, last = range(1, len(grid) + 1)
    for axis in others:
        cos, sin = waves(grid[axis - 1], grid[axis - 1], real.dtype, real.device)
        real, imaginary = (along(axis, cos, real) - along(axis, sin, imaginary),
                           along(axis, cos, imaginary) + along(axis, sin, real))
    side = grid[last - 1]
    cos, sin = waves(side, side // 2 + 1, real.dtype, real.device)
    frequency = torch.arange(side // 2 + 1, device=real.device)[:, None]
    twice = 2 - (frequency == 0).to(cos) - (2 * frequency == side).to(cos)  # both halves of the spectrum
    return along(last, (twice * cos).T, real) - along(last, (twice * sin).T, imaginary)


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    """x y of (..., 2), real and imaginary parts."""
    if not torch.compiler.is_exporting():
        return torch.view_as_real(torch.view_as_complex(x.contiguous()) * torch.view_as_complex(y.contiguous()))
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def waves(side: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (count, side) of 2 pi k n / side, orthonormal: ONNX's own transform takes no sizes that are free."""
    frequency = torch.arange(count, dtype=torch.float64, device=device)[:, None]
    angle = 2 * pi / side * frequency * torch.arange(side, dtype=torch.float64, device=device)
    return (angle.cos() * side**-0.5).to(dtype), (angle.sin() * side**-0.5).to(dtype)


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
    if torch.compiler.is_exporting():
        return _convolve_exported(x, kernel.to(precise), grid, size)
    spectrum = torch.fft.rfftn(kernel.to(precise), dim=tuple(range(-rank, 0)))
    # Axis by axis, so that no row of mere zeros is transformed and none that will be cropped.
    moved = torch.fft.rfft(x.to(precise), n=size[-1])
    for axis in range(-2, -rank - 1, -1):
        moved = torch.fft.fft(moved, n=size[axis], dim=axis)
    moved = moved * spectrum
    for axis in range(-rank, -1):
        moved = torch.fft.ifft(moved, dim=axis).narrow(axis, 0, grid[axis])
    return torch.fft.irfft(moved, n=size[-1]).narrow(-1, 0, grid[-1]).to(x.dtype)


def _convolve_exported(x: Tensor, kernel: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """`convolve_last` by the transforms that ONNX runs."""
    more = [amount for side, full in zip(grid[::-1], size[::-1], strict=True) for amount in (0, full - side)]
    padded, lead = F.pad(x.to(kernel), more), x.shape[:-len(grid)]
    spectra = [fourier(part.flatten(0, -len(grid) - 1)[..., None]) for part in (padded, kernel)]
    product = complex_product(spectra[0].unflatten(0, lead), spectra[1].unflatten(0, kernel.shape[:-len(grid)]))
    out = inverse_fourier(product.flatten(0, len(lead) - 1), size) * prod(size) ** 0.5
    return F.pad(out[..., 0].unflatten(0, lead), [-amount for amount in more]).to(x.dtype)


def on_circle(kernel: Tensor) -> Tensor:
    """The one-sided kernel (*grid, C) of `convolve` with as many zeros behind it: (*(2 side), C)."""
    return F.pad(kernel, [0, 0, *(end for side in reversed(kernel.shape[:-1]) for end in (0, side))])


def turned(kernel: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A kernel of `convolve` that looks the other way along axes: t becomes -t."""
    return kernel.flip(axes).roll([1] * len(axes), axes) if axes else kernel
