"""Selective attention expert by expert and image by image, with its weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.union_of_experts import SelectiveAttention, turn_half


def selective_attention(mixer: SelectiveAttention, x: Tensor) -> Tensor:
    """Every head over all tokens under a mask of those that the expert takes."""
    sequence = turn_half(x.flatten(1, -2), mixer.heads)
    taken, *_ = mixer.router(sequence)
    out = torch.zeros_like(sequence)
    for expert in range(mixer.heads):
        q, k, v = (sequence @ mixer.qkv[expert] + mixer.qkv_bias[expert]).chunk(3, -1)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~taken[:, expert, None], -torch.inf)
        head = logits.softmax(-1) @ v @ mixer.proj[expert] + mixer.proj_bias[expert]
        out = out + head * taken[:, expert, :, None]
    return out.view(x.shape)
