"""Scattering channels first: filters on mirrored maps, complex numbers, Einstein sums over blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.wavelet import HIGH, INVERSE_HIGH, INVERSE_LOW, LOW, Taps
from saccade.papers.svt import ComplexMlp, RowScattering, Scattering


def scattering(mixer: Scattering, x: Tensor, rows: ComplexMlp | None = None) -> Tensor:
    """T^-1(w * low, W_2 relu(W_1 high + b_1) + b_2), low, high = T(x)."""
    B, H, W, C = x.shape
    low, high = transform(F.pad(x.permute(0, 3, 1, 2), (0, W % 2, 0, H % 2), mode="replicate"))
    high = mlp(mixer.channels, high.unflatten(1, (mixer.groups, -1)), "bgcohw,gcd->bgdohw", (None,) * 3).flatten(1, 2)
    if rows is not None:
        high = mlp(rows, high, "bcohw,hwd->bcohd", ())
    return inverse(low * mixer.low.permute(2, 0, 1), high)[:, :, :H, :W].permute(0, 2, 3, 1)


def row_scattering(mixer: RowScattering, x: Tensor) -> Tensor:
    """A 3x3 convolution of the first half of the channels and scattering of the second, in turn."""
    first, second = x.chunk(2, -1)
    return torch.stack([mixer.local(first), scattering(mixer.scatter, second, mixer.scatter.rows)], -1).flatten(-2)


def mlp(layers: ComplexMlp, z: Tensor, product: str, axes: tuple[None, ...]) -> Tensor:
    """W_2 relu(W_1 z + b_1) + b_2; `axes` follow those that weights and biases have."""
    weight1, weight2 = (torch.complex(*weight) for weight in (layers.weight1, layers.weight2))
    bias1, bias2 = (torch.complex(*bias)[(..., *axes)] for bias in (layers.bias1, layers.bias2))
    z = torch.einsum(product, z, weight1) + bias1
    return torch.einsum(product, torch.complex(z.real.relu(), z.imag.relu()), weight2) + bias2


def transform(image: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> low (B, C, H, W), high (B, C, 6, H / 2, W / 2)."""
    smooth, fine = convolved(image, LOW, 3), convolved(image, HIGH, 3)
    bands = convolved(smooth, HIGH, 2), convolved(fine, HIGH, 2), convolved(fine, LOW, 2)
    first, second = zip(*map(quads_to_complex, bands))
    return convolved(smooth, LOW, 2), torch.stack([*first, *reversed(second)], 2)


def inverse(low: Tensor, high: Tensor) -> Tensor:
    angles = high.unbind(2)
    lh, hh, hl = (complex_to_quads(angles[place], angles[5 - place]) for place in range(3))
    smooth = convolved(low, INVERSE_LOW, 2) + convolved(lh, INVERSE_HIGH, 2)
    fine = convolved(hl, INVERSE_LOW, 2) + convolved(hh, INVERSE_HIGH, 2)
    return convolved(smooth, INVERSE_LOW, 3) + convolved(fine, INVERSE_HIGH, 3)


def convolved(image: Tensor, taps: Taps, axis: int) -> Tensor:
    """A symmetric filter along an axis of (B, C, H, W), mirrored over its edges."""
    side, reach, C = image.shape[axis], len(taps) - 1, image.shape[1]
    place = torch.arange(-reach, side + reach) % (2 * side)
    image = image.index_select(axis, torch.where(place < side, place, 2 * side - 1 - place))
    kernel = torch.tensor([*taps, *reversed(taps[:-1])], dtype=image.dtype)
    return F.conv2d(image, kernel.view((-1, 1) if axis == 2 else (1, -1)).repeat(C, 1, 1, 1), groups=C)


def quads_to_complex(band: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c, d = (band[:, :, row::2, column::2] / 2**0.5 for row in (0, 1) for column in (0, 1))
    return torch.complex(a - d, b + c), torch.complex(a + d, b - c)


def complex_to_quads(first: Tensor, second: Tensor) -> Tensor:
    B, C, h, w = first.shape
    band = first.real.new_empty(B, C, 2 * h, 2 * w)
    band[:, :, 0::2, 0::2], band[:, :, 0::2, 1::2] = first.real + second.real, first.imag + second.imag
    band[:, :, 1::2, 0::2], band[:, :, 1::2, 1::2] = first.imag - second.imag, second.real - first.real
    return band / 2**0.5
