"""Attention with head tokens, its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.dhvt import HeadInteraction


def head_interaction(mixer: HeadInteraction, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v among N tokens and one a head, all weights in memory."""
    B, *_, C = x.shape
    tokens, h = x.flatten(1, 2), mixer.heads
    means = tokens.view(B, -1, h, C // h).permute(0, 2, 1, 3).mean(2)
    spoken = torch.nn.functional.gelu(mixer.norm(mixer.summary(means).view(B, h, h, C // h))).flatten(2)
    tokens = torch.cat([tokens, spoken + mixer.identity], 1)
    q, k, v = mixer.qkv(tokens).view(B, -1, 3, h, C // h).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // h) ** -0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(B, -1, C)[:, :-h]).view(x.shape)
