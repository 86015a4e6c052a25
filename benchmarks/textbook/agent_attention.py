"""Agent attention with its weights written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.agent_attention import Agent


def agent(mixer: Agent, x: Tensor) -> Tensor:
    """softmax(q A^T / sqrt(d) + B2) softmax(A k^T / sqrt(d) + B1) v + conv(v), agents A the pooled queries."""
    B, H, W, C = x.shape
    heads, scale = mixer.heads, (C // mixer.heads) ** -0.5
    q, k, v = mixer.qkv(x).view(B, H * W, 3, C).unbind(2)
    agents = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(B, C, H, W), mixer.pool).flatten(2).transpose(1, 2)
    image = v.transpose(1, 2).reshape(B, C, H, W)
    q, k, v, agents = (part.reshape(B, -1, heads, C // heads).transpose(1, 2) for part in (q, k, v, agents))
    biases = []
    for bias in (mixer.gather, mixer.spread):
        coarse = F.interpolate(bias.coarse, size=(H, W), mode="bilinear")
        rows, columns = (
            F.interpolate(strip, size=side, mode="linear").unsqueeze(-2 + place)
            for strip, side, place in ((bias.axis0, H, 1), (bias.axis1, W, 0))
        )
        biases.append((coarse + rows + columns).flatten(2))
    gathered = (scale * agents @ k.transpose(-2, -1) + biases[0]).softmax(-1) @ v
    out = (scale * q @ agents.transpose(-2, -1) + biases[1].transpose(1, 2)).softmax(-1) @ gathered
    local = F.conv2d(image, mixer.local.weight, mixer.local.bias, padding=1, groups=C)
    return mixer.proj(out.transpose(1, 2).reshape(x.shape) + local.permute(0, 2, 3, 1))
