"""MedViTV2's attention with neighbours and weights written out."""

from __future__ import annotations

from torch import Tensor

from benchmarks.textbook.nat import neighborhood
from saccade.papers.medvit_v2 import RunPooledAttention, ScrambledNeighborhood


def scrambled_neighborhood(mixer: ScrambledNeighborhood, x: Tensor) -> Tensor:
    """Neighborhood attention, its neighbours copied out, on a reshape without a permute, and back."""
    B, H, W, C = x.shape
    mixed = neighborhood(mixer.attention, x.permute(0, 3, 1, 2).reshape(B, H, W, C))  # type: ignore[arg-type]
    return mixed.reshape(B, C, H, W).permute(0, 2, 3, 1)


def run_pooled_attention(mixer: RunPooledAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all N x M weights in memory."""
    B, *_, C = x.shape
    tokens = x.flatten(1, -2)
    keys = max(tokens.shape[1] // mixer.run, 1)
    means = tokens[:, :keys * mixer.run].view(B, keys, -1, C).mean(2)
    k, v = mixer.kv(mixer.norm(means)).view(B, keys, 2, mixer.heads, -1).permute(2, 0, 3, 1, 4)
    q = mixer.q(tokens).view(B, -1, mixer.heads, C // mixer.heads).transpose(1, 2)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
