"""One head on a part of the channels, its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.shvit import SingleHeadAttention


def single_head(mixer: SingleHeadAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on the attended channels, all N x N weights in memory."""
    part, rest = x[..., : mixer.part], x[..., mixer.part :]
    qkv = mixer.qkv(mixer.norm(part)).flatten(1, -2)
    q, k, v = qkv.split((mixer.qk_dim, mixer.qk_dim, mixer.part), -1)
    weights = (q @ k.transpose(-2, -1) * mixer.qk_dim**-0.5).softmax(-1)
    return mixer.proj(torch.cat([(weights @ v).view(part.shape), rest], -1).relu())
