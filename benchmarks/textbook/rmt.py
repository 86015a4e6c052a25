"""Manhattan self-attention along rows and columns, with its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.rmt import ManhattanAttention, rotate


def manhattan(mixer: ManhattanAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + |i - j| log gamma) v in each row, then in each column of the result."""
    B, H, W, C = x.shape
    qkv = mixer.qkv(x).view(B, H, W, 3, mixer.heads, -1)
    q, k = rotate(qkv[..., :2, :, :]).unbind(3)
    v = qkv[..., 2, :, :]
    decays = torch.tensor(mixer.decays, dtype=x.dtype)[:, None, None]

    def weights(q: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2])
        fade = decays * (place[:, None] - place).abs()
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + fade).softmax(-1)

    rows = [part.transpose(2, 3) for part in (q, k, v)]  # (B, H, heads, W, d)
    v = (weights(rows[0], rows[1]) @ rows[2]).transpose(2, 3)
    columns = [part.permute(0, 2, 3, 1, 4) for part in (q, k, v)]  # (B, W, heads, H, d)
    out = (weights(columns[0], columns[1]) @ columns[2]).permute(0, 3, 1, 2, 4)
    return mixer.proj(out.reshape(x.shape) + mixer.local(qkv[..., 2, :, :].reshape(x.shape)))
