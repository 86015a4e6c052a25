"""Neighborhood attention by copying out each token's neighbours; relative attention with all weights written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.nat import Neighborhood, RelativeAttention


def neighborhood(mixer: Neighborhood, x: Tensor) -> Tensor:
    """Keys and values of all k x k neighbours gathered for each query, weights written out (dilation 1)."""
    B, H, W, C = x.shape
    side, heads = mixer.kernel, mixer.heads
    x = F.pad(x, (0, 0, 0, max(0, side - W), 0, max(0, side - H)))
    rows, columns = x.shape[1:3]
    q, k, v = mixer.qkv(x).view(B, rows * columns, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    near = [(torch.arange(size) - side // 2).clamp(0, size - side)[:, None] + torch.arange(side)
            for size in (rows, columns)]
    tokens = (near[0][:, None, :, None] * columns + near[1][None, :, None, :]).flatten(0, 1).flatten(1)  # (N, k k)
    logits = (q[..., None, :] * (C // heads) ** -0.5 @ k[:, :, tokens].transpose(-2, -1))[..., 0, :]
    if mixer.bias is not None:
        down, across = (at - torch.arange(len(at))[:, None] + side - 1 for at in near)
        logits = logits + mixer.bias[:, down[:, None, :, None], across[None, :, None, :]].flatten(1, 2).flatten(2)
    out = (logits.softmax(-1)[..., None, :] @ v[:, :, tokens])[..., 0, :]
    return mixer.proj(out.transpose(1, 2).reshape(B, rows, columns, C))[:, :H, :W]


def relative_attention(mixer: RelativeAttention, x: Tensor) -> Tensor:
    """The bias of each pair of tokens looked up (native grid), the (N, N) weights written out."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    row, column = torch.arange(H * W) // W, torch.arange(H * W) % W
    bias = mixer.bias[:, row - row[:, None] + H - 1, column - column[:, None] + W - 1]
    weights = ((q * (C // mixer.heads) ** -0.5) @ k.mT + bias).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C))
