"""Complex attention with the angles of all pairs of tokens in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.complexformer import EPS, ComplexAttention, turns


def complex_attention(mixer: ComplexAttention, x: Tensor) -> Tensor:
    """sum_c r_i r_j cos(delta (phi_i - phi_j) + b + (i - j) g), pair by pair (no causal mask)."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    (size_q, phi_q), (size_k, phi_k) = (
        ((a.square() + b.square() + EPS).sqrt(), torch.atan2(b, a)) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
    place = turns(H * W, size_q.shape[-1], x.device, x.dtype)
    logits = torch.empty(B, mixer.heads, H * W, H * W, dtype=x.dtype, device=x.device)
    for i in range(H * W):  # the angles of one query to all keys: those of all would not fit for long
        apart = phi_q[:, :, i, None] - phi_k
        angle = mixer.factor[:, None] * apart + mixer.offset[:, None] + place[i] - place
        logits[:, :, i] = (size_q[:, :, i, None] * size_k * angle.cos()).sum(-1)
    return mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C))
