"""Gaussian adaptive attention Gaussian by Gaussian, densities multiplied and then divided by their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.gaam import AXES, EPS, GaussianAdaptive


def gaussian_adaptive_attention(mixer: GaussianAdaptive, x: Tensor) -> Tensor:
    """One head after the other, one Gaussian after the other."""
    tokens, axis = x.flatten(1, -2), AXES[mixer.axis]
    length = tokens.shape[axis] // mixer.heads
    out = []
    for head in range(mixer.heads):
        last = (head + 1) * length if head < mixer.heads - 1 else tokens.shape[axis]
        piece = tokens.narrow(axis, head * length, last - head * length)
        mean, variance = piece.mean(axis, keepdim=True), piece.var(axis, keepdim=True) + EPS
        density = torch.ones_like(piece)
        for offset, width in zip(mixer.offset[head], mixer.width[head]):
            standing = (piece - (mean + offset)) / variance.sqrt()
            density = density * torch.exp(-(standing**2) / (2 * width**2)) / torch.sqrt(2 * torch.pi * width**2)
        out.append(piece * density / density.sum(axis, keepdim=True).clamp(min=EPS))
    return torch.cat(out, axis).view(x.shape)
