"""Combiner with its full attention matrix in memory, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.combiner import CombinerAxial, CombinerFixed


def combiner_fixed(mixer: CombinerFixed, x: Tensor) -> Tensor:
    """A of all pairs of tokens, a row of queries at a time (no causal mask)."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H, W, 3, mixer.heads, -1).permute(3, 0, 4, 1, 2, 5)
    q = q * (C // mixer.heads) ** -0.5
    share = torch.stack([(q[:, :, row].amax(2, keepdim=True) @ k[:, :, row].mT).softmax(-1) for row in range(H)], 2)
    rows = []
    for row in range(H):
        logits = torch.cat([q[:, :, row] @ k[:, :, row].mT, q[:, :, row] @ k.amax(3).mT], -1).softmax(-1)
        whole = logits[..., W:, None] * share.transpose(2, 3)  # (B, heads, W, H, W)
        whole[:, :, :, row] = whole[:, :, :, row] + logits[..., :W]
        rows.append(whole.flatten(3))
    out = torch.cat(rows, 2) @ v.flatten(2, 3)
    return mixer.proj(out.transpose(1, 2).reshape(B, H, W, C))


def combiner_axial(mixer: CombinerAxial, x: Tensor) -> Tensor:
    """A of all pairs of tokens."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H, W, 3, mixer.heads, -1).permute(3, 0, 4, 1, 2, 5)
    q = q * (C // mixer.heads) ** -0.5
    share = (q @ k.mT).softmax(-1)
    summary = mixer.summary((share @ v).permute(0, 2, 3, 1, 4).reshape(B, H, W, C))
    key = mixer.summary_key(mixer.norm(summary + x)).view(B, H, W, mixer.heads, -1).permute(0, 3, 1, 2, 4)
    logits = torch.cat([q @ k.mT, torch.einsum("bhstd,bhrtd->bhstr", q, key)], -1).softmax(-1)
    whole = torch.einsum("bhstr,bhrtj->bhstrj", logits[..., W:], share)
    whole = whole + torch.einsum("bhstj,sr->bhstrj", logits[..., :W], torch.eye(H, dtype=x.dtype))
    out = whole.flatten(4).flatten(2, 3) @ v.flatten(2, 3)
    return mixer.proj(out.transpose(1, 2).reshape(B, H, W, C))
