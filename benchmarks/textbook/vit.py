"""Softmax attention with its weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.parts.attention import Attention


def attention(mixer: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all N x N weights in memory."""
    B, *_, C = x.shape
    q, k, v = mixer.qkv(x).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
