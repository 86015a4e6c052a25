"""The whole spectrum there and back, its high frequencies thrown away, all attention weights in memory."""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.dct_histo import DctAttention


def matrix(side: int, x: Tensor) -> Tensor:
    """The orthonormal DCT-II matrix."""
    place, frequency = torch.arange(side, dtype=x.dtype) + 0.5, torch.arange(side, dtype=x.dtype)[:, None]
    rows = (2 / side) ** 0.5 * torch.cos(pi / side * place * frequency)
    rows[0] /= 2**0.5
    return rows


def dct_attention(mixer: DctAttention, x: Tensor) -> Tensor:
    """DCT^-1(F + attention(norm(F) + position)), channels first."""
    B, H, W, C = x.shape
    rows, columns = matrix(H, x), matrix(W, x)
    spectrum = rows @ x.permute(0, 3, 1, 2) @ columns.T
    kept = mixer.kept((H, W))
    low = spectrum[:, :, : kept[0], : kept[1]].permute(0, 2, 3, 1)
    tokens = mixer.position(mixer.norm(low)).flatten(1, 2)
    q, k, v = mixer.qkv(tokens).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    low = low + mixer.proj((weights @ v).transpose(1, 2).reshape(B, -1, C)).view(low.shape)
    spectrum = F.pad(low.permute(0, 3, 1, 2), (0, W - kept[1], 0, H - kept[0]))
    return (rows.T @ spectrum @ columns).permute(0, 2, 3, 1)
