"""Attention by positive random features with its weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.t2t_vit import TokenPerformer


def token_performer(mixer: TokenPerformer, x: Tensor) -> Tensor:
    """v + proj(A v), A_ij = phi(q_i) . phi(k_j) / (sum_j phi(q_i) . phi(k_j) + 1e-8), all N x N weights in memory."""
    q, k, v = mixer.qkv(x.flatten(1, -2)).chunk(3, -1)
    scores = mixer.positive(q) @ mixer.positive(k).transpose(-2, -1)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-8)
    return (v + mixer.proj(weights @ v)).view(x.shape)
