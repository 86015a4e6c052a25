"""Attention with a bias by |offset|, its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.fcaformer import CrossAttention


def forward_cross_attention(mixer: CrossAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + b[|i - j|]) v, all N x N weights in memory (no cross tokens: a block's first)."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    place = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    apart = (place[:, None] - place).abs()
    bias = mixer.bias.view(-1, H, W)[:, apart[..., 0], apart[..., 1]]
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5 + bias).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
