"""Fused neighborhood attention with its default settings, dense under a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.fused_neighborhood import FusedNeighborhood


def fused_neighborhood(mixer: FusedNeighborhood, x: Tensor) -> Tensor:
    """All N x N pairs under a mask that is -inf outside the window."""
    B, H, W, C = x.shape
    down, across = mixer.kernel
    x = F.pad(x, (0, 0, 0, max(0, across - W), 0, max(0, down - H)))
    rows, columns = x.shape[1:3]
    q, k, v = mixer.qkv(x).view(B, rows * columns, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    seen = []
    for size, side in ((rows, down), (columns, across)):
        first = (torch.arange(size) - side // 2).clamp(0, size - side)[:, None]
        place = torch.arange(size)
        seen.append((place >= first) & (place < first + side))
    mask = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).view(rows * columns, -1)
    logits = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).masked_fill(~mask, -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, rows, columns, C)
    return mixer.proj(out)[:, :H, :W]
