"""Attention with a convolution of its values, its weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.smt import LocalValueAttention


def local_attention_of_values(mixer: LocalValueAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v + conv(v), all N x N weights in memory."""
    B, *_, C = x.shape
    q, k, v = mixer.qkv(x).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    values = v.transpose(1, 2).reshape(x.shape)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape) + mixer.local(values))
