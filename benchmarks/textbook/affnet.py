"""The adaptive frequency filter from its equations, each real product by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.affnet import AdaptiveFrequencyFilter


def adaptive_frequency_filter(mixer: AdaptiveFrequencyFilter, x: Tensor) -> Tensor:
    """x + F^-1(M(F(x)) * F(x)), channels first, a product for each pair of real and imaginary parts."""
    spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2), norm="ortho")
    parts = spectrum.unflatten(1, (mixer.blocks, -1))

    def layer(real: Tensor, imaginary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        def product(part: Tensor, which: int) -> Tensor:
            return torch.einsum("bkihw,kio->bkohw", part, weight[which])

        return (product(real, 0) - product(imaginary, 1) + bias[0][..., None, None],
                product(imaginary, 0) + product(real, 1) + bias[1][..., None, None])

    hidden = [mixer.activation(part) for part in layer(parts.real, parts.imag, mixer.w1, mixer.b1)]
    real, imaginary = (F.softshrink(part, mixer.threshold).flatten(1, 2)
                       for part in layer(*hidden, mixer.w2, mixer.b2))
    mixed = torch.fft.irfft2(torch.complex(real, imaginary) * spectrum, s=x.shape[1:3], norm="ortho")
    return x + mixed.permute(0, 2, 3, 1)
