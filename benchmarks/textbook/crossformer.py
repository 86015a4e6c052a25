"""Attention in groups of near or of far tokens, with its weights and its mask written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.crossformer import LongShortDistance


def long_short_distance(mixer: LongShortDistance, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + mlp(offset) + mask) v in each group of the padded grid."""
    B, H, W, C = x.shape
    (h, w), step = mixer.group, mixer.interval
    inside = F.pad(torch.ones(1, H, W, 1, dtype=x.dtype), (0, 0, 0, -W % (w * step), 0, -H % (h * step)))
    x = F.pad(x, (0, 0, 0, -W % (w * step), 0, -H % (h * step)))
    rows, columns = x.shape[1] // (h * step), x.shape[2] // (w * step)

    def groups(image: Tensor) -> Tensor:
        parts = image.reshape(len(image), rows, h, step, columns, w, step, -1)
        return parts.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, h * w, image.shape[-1])

    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).flatten(0, 1)
    bias = mixer.bias.mlp((places[:, None] - places).to(x.dtype)).permute(2, 0, 1)  # of every pair anew
    q, k, v = mixer.qkv(groups(x)).view(-1, h * w, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5 + bias
    mask = (groups(inside) - 1).transpose(1, 2).expand(-1, h * w, -1) * 1e6
    logits = (logits.unflatten(0, (B, -1)) + mask[:, None]).flatten(0, 1)
    out = mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    out = out.view(B, rows, columns, step, step, h, w, C).permute(0, 1, 5, 3, 2, 6, 4, 7)
    return out.reshape(B, rows * h * step, columns * w * step, C)[:, :H, :W]
