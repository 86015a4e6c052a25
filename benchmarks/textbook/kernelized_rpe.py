"""Kernelized attention with relative positions, with the weights of all pairs in memory."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.window import relative_position_index
from saccade.papers.kernelized_rpe import KernelizedRelative


def kernelized_relative_attention(mixer: KernelizedRelative, x: Tensor) -> Tensor:
    """phi(q) phi(k)^T exp(b), each row over its sum (native grid)."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    q, k = ((each / each.norm(dim=-1, keepdim=True) @ mixer.directions.T).exp() for each in (q, k))
    weights = (q @ k.mT) * mixer.bias.flatten(1).exp()[:, relative_position_index((H, W), x.device).T]
    weights = weights / weights.sum(-1, keepdim=True)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C))
