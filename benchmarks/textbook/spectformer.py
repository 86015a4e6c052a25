"""The spectral gate channels first, as its authors' figure has it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.spectformer import SpectralGating


def spectral_gating(mixer: SpectralGating, x: Tensor) -> Tensor:
    """irfft2(w * rfft2(x))."""
    weights = torch.view_as_complex(mixer.filter).permute(2, 0, 1)
    spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2).contiguous(), norm="ortho")
    return torch.fft.irfft2(spectrum * weights, s=x.shape[1:3], norm="ortho").permute(0, 2, 3, 1).contiguous()
