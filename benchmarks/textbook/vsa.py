"""Attention to windows that move and stretch, with its samples and weights written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.vsa import VariedSizeWindow


def varied_size_window(mixer: VariedSizeWindow, x: Tensor) -> Tensor:
    """softmax(q k'^T / sqrt(d) + B) v', k' and v' read at place + scale * (place - centre) + offset."""
    B, H, W, C = x.shape
    (h, w), heads = mixer.window, mixer.heads
    q, k, v = F.pad(mixer.qkv(x), (0, 0, 0, -W % w, 0, -H % h)).chunk(3, -1)
    rows, columns = q.shape[1] // h, q.shape[2] // w
    means = F.pad(x, (0, 0, 0, -W % w, 0, -H % h)).view(B, rows, h, columns, w, C).mean((2, 4))
    means = F.leaky_relu(means)
    offset, scale = (layer(means).view(B, rows, columns, heads, 2) for layer in (mixer.offsets, mixer.scales))
    offset = offset / torch.tensor([max(W // w, 1), max(H // h, 1)], dtype=x.dtype)
    y, x_ = (torch.arange(side, dtype=x.dtype) for side in (rows * h, columns * w))
    centre = torch.stack(torch.meshgrid(y // h * h + (h - 1) / 2, x_ // w * w + (w - 1) / 2, indexing="ij")[::-1], -1)
    place = torch.stack(torch.meshgrid(y, x_, indexing="ij")[::-1], -1)
    step = 2 / torch.tensor([columns * w - 1, rows * h - 1], dtype=x.dtype)

    def spread(value: Tensor) -> Tensor:
        value = value.permute(0, 3, 1, 2, 4).reshape(B * heads, rows, columns, 2)
        return value.repeat_interleave(h, 1).repeat_interleave(w, 2)

    def groups(image: Tensor) -> Tensor:
        parts = image.reshape(len(image), rows, h, columns, w, -1).transpose(2, 3)
        return parts.reshape(len(image), rows * columns, h * w, -1)

    where = place * step - 1 + (place - centre) * step * spread(scale) + spread(offset)
    k, v = (
        groups(F.grid_sample(part.reshape(B, rows * h, columns * w, heads, -1).permute(0, 3, 4, 1, 2).flatten(0, 1),
                             where, align_corners=True).permute(0, 2, 3, 1)).unflatten(0, (B, heads))
        for part in (k, v)
    )
    q = groups(q).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
    out = ((q @ k.transpose(-2, -1) * mixer.scale + mixer.bias()[:, None]).softmax(-1) @ v).permute(0, 2, 3, 1, 4)
    out = out.reshape(B, rows, columns, h, w, -1).transpose(2, 3).reshape(B, rows * h, columns * w, -1)
    return mixer.proj(out[:, :H, :W])
