"""Sink fixed attention with scores and mask of all pairs of tokens in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.sinklora import SinkFixedAttention


def sink_fixed_attention(mixer: SinkFixedAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with -inf where a head does not see (neither cyclic nor causal, no rotary positions).
    """
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    number, length = torch.arange(H * W), max(H * W // mixer.groups, 1)
    half = (length + 1) // 2
    run = number // length  # of the heads that are not shifted
    later = (number - half) % (H * W) // length
    apart = (number[:, None] < half) != (number < half)  # the two sides of the wrap
    seen = torch.stack([run[:, None] == run] * (mixer.heads // 2)
                       + [(later[:, None] == later) & ~apart] * (mixer.heads - mixer.heads // 2))
    seen[:, : mixer.sinks], seen[:, :, : mixer.sinks] = True, True
    logits = (q @ k.mT * (C // mixer.heads) ** -0.5).masked_fill(~seen.to(x.device), -torch.inf)
    return mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C))
