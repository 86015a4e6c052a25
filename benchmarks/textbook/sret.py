"""Attention in groups of a shuffled sequence, its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.sret import SlicedGroup, order_of


def sliced_group(mixer: SlicedGroup, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v a group, all weights of all groups in memory."""
    B, *_, C = x.shape
    tokens, h = x.flatten(1, 2), mixer.heads
    order = order_of(tokens.shape[1], x.device) if mixer.shuffle else torch.arange(tokens.shape[1], device=x.device)
    tokens, out = tokens[:, order], []
    for group in tokens.split(-(-tokens.shape[1] // mixer.groups), 1):
        q, k, v = mixer.qkv(group).view(B, -1, 3, h, C // h).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (C // h) ** -0.5).softmax(-1)
        out.append((weights @ v).transpose(1, 2).reshape(B, -1, C))
    return mixer.proj(torch.cat(out, 1)[:, order.argsort()]).view(x.shape)
