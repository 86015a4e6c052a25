"""Universal relative attention with bias, factor and weights of all pairs of tokens in memory."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.window import relative_position_index
from saccade.papers.urpe import UniversalRelative


def universal_relative_attention(mixer: UniversalRelative, x: Tensor) -> Tensor:
    """(softmax(q k^T / sqrt(d) + b) c) v, both tables looked up pair by pair (native grid)."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    pairs = relative_position_index((H, W), x.device).T
    bias, factor = (offsets.table.flatten(1)[:, pairs] for offsets in (mixer.bias, mixer.factor))
    weights = (q @ k.mT * (C // mixer.heads) ** -0.5 + bias).softmax(-1) * factor
    return mixer.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C))
