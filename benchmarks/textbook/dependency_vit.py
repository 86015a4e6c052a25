"""Reversed attention as its figure has it: the transposed weights, gated, are a matrix."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.dependency_vit import ReversedAttention


def reversed_attention(mixer: ReversedAttention, x: Tensor) -> Tensor:
    """(A^T * p * m) v, all N x N weights in memory four times."""
    B, *_, C = x.shape
    tokens = x.flatten(1, -2)
    q, k, v = mixer.qkv(tokens).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    p = (mixer.selector(tokens) / mixer.temperature).softmax(-1).transpose(1, 2).unsqueeze(2)
    m = mixer.controller(tokens).sigmoid().transpose(1, 2).unsqueeze(1)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1).transpose(-2, -1)
    return mixer.proj((weights * p * m @ v).transpose(1, 2).reshape(x.shape))
