"""Gated positional self-attention with both maps of weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.convit import GatedPositional


def gated_positional(mixer: GatedPositional, x: Tensor) -> Tensor:
    """((1 - g) softmax(q k^T / sqrt(d)) + g softmax(position logits)) v."""
    B, *grid, C = x.shape
    q, k, v = mixer.qkv(x).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    gate = mixer.gate.sigmoid()[:, None, None]
    content = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    weights = (1 - gate) * content + gate * mixer.position(tuple(grid))
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
