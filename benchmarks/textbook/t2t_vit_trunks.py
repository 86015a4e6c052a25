"""Ghost and squeezed attention with their weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.t2t_vit_trunks import GhostAttention, SqueezedAttention


def ghost_attention(mixer: GhostAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, the second half of each of q, k, v a scaled copy of the first."""
    halves = mixer.qkv(x.flatten(1, -2)).chunk(3, -1)
    q, k, v = (torch.cat([half, half * copy], -1).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
               for half, copy in zip(halves, mixer.copies, strict=True))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def squeezed_attention(mixer: SqueezedAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, then each channel times a gate from its mean."""
    B, *_, C = x.shape
    q, k, v = mixer.qkv(x).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    out = mixer.proj((weights @ v).transpose(1, 2).reshape(B, -1, C))
    gate = mixer.squeeze.fc2(mixer.squeeze.fc1(out.mean(1)).relu()).sigmoid()
    return (out * gate[:, None]).view(x.shape)
