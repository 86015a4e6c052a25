"""LESS attention with its softmax weights written out and one sum over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.less_vit import Branch, LessAttention, Summary


def branch(layer: Branch, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, heads, rank, N, d)."""
    q, k = layer.qk(x).unflatten(-1, (2, layer.heads, layer.rank, -1)).permute(2, 0, 3, 4, 1, 5)
    v = layer.v(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)[:, :, None]
    return (layer.q_norm(q) @ layer.k_norm(k).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def summary(layer: Summary, x: Tensor) -> Tensor:
    normed = layer.norm(x)
    q = layer.q(normed[:, :, :1]).unflatten(-1, (layer.heads, -1)).transpose(2, 3)
    k, v = layer.kv(normed).unflatten(-1, (2, layer.heads, -1)).permute(3, 0, 1, 4, 2, 5)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return x[:, :, 0] + layer.proj((weights @ v).flatten(2))


def less_attention(mixer: LessAttention, x: Tensor) -> Tensor:
    tokens = x.flatten(2, -2)
    bands = mixer.band_norm(summary(mixer.of_bands, mixer.to_bands(tokens)))
    places = mixer.place_norm(summary(mixer.of_places, mixer.to_places(tokens).transpose(1, 2)))
    c, s = branch(mixer.attention.channel_branch, bands), branch(mixer.attention.spatial_branch, places)
    return mixer.attention.proj(torch.einsum("bhrax,bhrty->bathxy", c, s).flatten(3)).view(x.shape)
