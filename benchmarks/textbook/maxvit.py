"""Attention in blocks and in a spread grid, with its weights, its bias and its mask written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.maxvit import BlockAttention


def block_attention(mixer: BlockAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + B + mask) v among the h x w neighbours of each block."""
    (B, H, W, C), (h, w) = x.shape, mixer.window
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w

    def cut(x: Tensor) -> Tensor:
        return x.view(-1, rows, h, columns, w, x.shape[-1]).transpose(2, 3).reshape(-1, h * w, x.shape[-1])

    x = attend(mixer, cut(x), cut(padding(x, H, W)))
    return x.view(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)[:, :H, :W]


def grid_attention(mixer: BlockAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + B + mask) v among the h x w tokens that lie a step apart, from each start in a step."""
    (B, H, W, C), (h, w) = x.shape, mixer.window
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w

    def cut(x: Tensor) -> Tensor:
        return x.view(-1, h, rows, w, columns, x.shape[-1]).permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, x.shape[-1])

    x = attend(mixer, cut(x), cut(padding(x, H, W)))
    return x.view(B, rows, columns, h, w, C).permute(0, 3, 1, 4, 2, 5).reshape(B, rows * h, columns * w, C)[:, :H, :W]


def padding(x: Tensor, height: int, width: int) -> Tensor:
    """(B, *padded, 1): -inf on what was padded, else 0."""
    mask = torch.full_like(x[..., :1], -torch.inf)
    mask[:, :height, :width] = 0
    return mask


def attend(mixer: BlockAttention, groups: Tensor, mask: Tensor) -> Tensor:
    """Attention within groups (B x G, N, C), the weights in memory."""
    q, k, v = mixer.qkv(groups).unflatten(-1, (3, mixer.heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mixer.bias() + mask[:, None].transpose(-2, -1)
    return mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
