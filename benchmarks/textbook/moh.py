"""TransNeXt's attentions in their textbook form, each head times the gate that the token gives it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.textbook.transnext import aggregated_heads, cosine_heads
from saccade.papers.moh import AggregatedMixtureOfHead, HeadGate, MixtureOfHead


def gates(gate: HeadGate, x: Tensor) -> Tensor:
    """a_1 S softmax(x W_s) of S shared heads, a_2 R top_R(softmax(x W_r)) / its sum: (B, *grid, C) -> (B, N, h)."""
    x = x.flatten(1, -2)
    one = x.new_ones(*x.shape[:2], gate.shared)
    shared = one if gate.share is None else gate.shared * gate.share(x).softmax(-1)
    if gate.route is None:
        return shared
    scores = gate.route(x).softmax(-1)
    least = scores.sort(-1, descending=True).values[..., gate.routed - 1, None]
    kept = torch.where(scores >= least, scores, 0)
    routed = gate.routed * kept / kept.sum(-1, keepdim=True)
    if gate.balance is None:
        return routed
    between = 2 * gate.balance(x).softmax(-1)
    return torch.cat([between[..., :1] * shared, between[..., 1:] * routed], -1)


def mixture_of_head(mixer: MixtureOfHead, x: Tensor) -> Tensor:
    return mixer.proj((gates(mixer.gate, x)[..., None] * cosine_heads(mixer, x)).reshape(x.shape))


def aggregated_mixture_of_head(mixer: AggregatedMixtureOfHead, x: Tensor) -> Tensor:
    return mixer.proj((gates(mixer.gate, x)[..., None] * aggregated_heads(mixer, x)).reshape(x.shape))
