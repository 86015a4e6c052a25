"""Bi-level routing with the chosen regions' keys and values copied out and the weights written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.biformer import BiLevelRouting


def bilevel_routing(mixer: BiLevelRouting, x: Tensor) -> Tensor:
    """softmax(scale q k[I]^T) v[I], I the regions whose mean key suits a region's mean query best."""
    B, H, W, C = x.shape
    S = mixer.regions
    x = F.pad(x, (0, 0, 0, -W % S, 0, -H % S))
    (h, w), padded = (x.shape[1] // S, x.shape[2] // S), x.shape[1:3]
    qkv = mixer.qkv(x)
    regions = qkv.view(B, S, h, S, w, -1).transpose(2, 3).reshape(B, S * S, h * w, -1)
    q, k, v = regions.split((mixer.qk_dim, mixer.qk_dim, C), -1)
    routes = (q.mean(2) @ k.mean(2).transpose(1, 2)).topk(min(mixer.topk, S * S), -1).indices
    image = torch.arange(B)[:, None, None]
    k, v = k[image, routes].flatten(2, 3), v[image, routes].flatten(2, 3)  # (B, S S, K N, C)
    q, k, v = (part.unflatten(-1, (mixer.heads, -1)).transpose(2, 3) for part in (q, k, v))
    out = ((q @ k.transpose(-2, -1) * mixer.scale).softmax(-1) @ v).transpose(2, 3).reshape(B, S, S, h, w, C)
    out = out.transpose(2, 3).reshape(B, *padded, C) + mixer.local(qkv[..., 2 * mixer.qk_dim:])
    return mixer.proj(out[:, :H, :W])
