"""MOAT's attention with its weights written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.window import relative_position_index
from saccade.papers.moat import MoatAttention


def moat_attention(mixer: MoatAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + B) v over the grid, B gathered from a table resampled to its offsets."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, -1, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    table = F.interpolate(mixer.table.permute(2, 0, 1)[None], size=(2 * H - 1, 2 * W - 1), mode="bilinear")[0]
    bias = table.flatten(1)[:, relative_position_index((H, W), x.device)]
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5 + bias).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
