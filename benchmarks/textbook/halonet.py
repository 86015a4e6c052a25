"""Halo attention with its windows unfolded and its weights written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.halonet import HaloAttention


def halo_attention(mixer: HaloAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + q (r_y + r_x)^T) v in each block, with every window copied out of the padded map."""
    B, H, W, C = x.shape
    b, halo, w, h = mixer.block, mixer.halo, mixer.window, mixer.heads
    rows, columns = -(-H // b), -(-W // b)

    def unfolded(image: Tensor, kernel: int) -> Tensor:
        """(B, rows b + kernel - b, columns b + kernel - b, C) -> (B, rows columns, h, kernel^2, C / h)."""
        tiles = image.unfold(1, kernel, b).unfold(2, kernel, b)
        return tiles.reshape(B, rows * columns, h, -1, kernel * kernel).transpose(-2, -1)

    ends = (-H % b, -W % b)
    q = unfolded(F.pad(mixer.q(x), (0, 0, 0, ends[1], 0, ends[0])), b)
    kv = unfolded(F.pad(mixer.kv(x), (0, 0, halo, halo + ends[1], halo, halo + ends[0])), w)
    k, v = kv.split([mixer.key_dim, mixer.value_dim], -1)
    logits = (q @ k.transpose(-2, -1) * mixer.key_dim**-0.5).unflatten(-1, (w, w)).unflatten(-3, (b, b))
    offset = torch.arange(w)[None] - torch.arange(b)[:, None] + w - 1
    r_y, r_x = (vectors[offset] for vectors in mixer.offsets.chunk(2))
    q = q.unflatten(-2, (b, b))
    logits = logits + torch.einsum("bghyxd,yjd->bghyxj", q, r_y)[..., None]
    logits = logits + torch.einsum("bghyxd,xjd->bghyxj", q, r_x)[..., None, :]
    seen = [torch.arange(count)[:, None] * b - halo + torch.arange(w) < size + halo
            for count, size in ((rows, H), (columns, W))]
    mask = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).flatten(0, 1)
    weights = logits.masked_fill(~mask[:, None, None, None], -torch.inf).flatten(-2).softmax(-1)
    out = weights.flatten(3, 4) @ v
    out = out.view(B, rows, columns, h, b, b, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, rows * b, columns * b, -1)
    return out[:, :H, :W]
