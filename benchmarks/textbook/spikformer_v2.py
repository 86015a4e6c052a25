"""Spiking self-attention step by step, with all pairs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.spiking import fire
from saccade.papers.spikformer_v2 import DirectSpikingAttention


def spiking_self_attention(mixer: DirectSpikingAttention, x: Tensor) -> Tensor:
    """The input repeated; q k^T v with the counts of all pairs."""
    repeated = x.flatten(1, -2).repeat(mixer.steps, 1, 1)

    def spikes(current: Tensor, threshold: float) -> Tensor:
        return fire(current.unflatten(0, (mixer.steps, -1)), threshold).flatten(0, 1)

    q, k, v = (spikes(part, mixer.qkv_neurons.threshold).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
               for part in mixer.qkv_norm(mixer.qkv(repeated)).chunk(3, -1))
    counts = torch.matmul(q, k.transpose(-2, -1)) * mixer.scale
    out = spikes((counts @ v).transpose(1, 2).flatten(2), mixer.neurons.threshold)
    out = spikes(mixer.proj_norm(mixer.proj(out)), mixer.proj_neurons.threshold)
    return out.unflatten(0, (mixer.steps, -1)).mean(0).view(x.shape)
