"""Attention with convolutional projections, its weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.cvt import ConvolutionalProjection


def convolutional_projection(mixer: ConvolutionalProjection, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, all N x M weights in memory."""
    C = x.shape[-1]
    q, k, v = (linear(local(x).flatten(1, -2)).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
               for linear, local in zip((mixer.q, mixer.k, mixer.v), mixer.local, strict=True))
    weights = (q @ k.transpose(-2, -1) * C**-0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
