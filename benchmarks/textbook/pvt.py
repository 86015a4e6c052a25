"""Spatial-reduction attention with its weights written out."""

from __future__ import annotations

from torch import Tensor

from saccade.parts.reduction import SpatialReduction


def spatial_reduction(mixer: SpatialReduction, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all N x M weights in memory."""
    B, *_, C = x.shape
    k, v = mixer.kv(mixer.merged(x)).view(B, -1, 2, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    q = mixer.q(x).view(B, -1, mixer.heads, C // mixer.heads).transpose(1, 2)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))


pooled_reduction = spatial_reduction
