"""Hyena N-D with its convolutions as convolutions: a depthwise kernel as wide as the map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.hyena_nd import HyenaNd


def hyena_nd(mixer: HyenaNd, x: Tensor) -> Tensor:
    """Two gates, one direction: every token looks back along both axes."""
    H, W, C = x.shape[1:]
    gate, second, v = mixer.short(mixer.in_proj(x)).movedim(-1, 1).split(C, 1)
    v = v * second
    kernel = mixer.filter((H, W)).movedim(-1, 0)[:, None] / (2 * max(H, W))
    if mixer.first_round:  # ahead instead of back
        long = F.conv2d(F.pad(v, (0, W - 1, 0, H - 1)), kernel, groups=C)
    else:
        long = F.conv2d(F.pad(v, (W - 1, 0, H - 1, 0)), kernel.flip(2, 3), groups=C)
    return mixer.out_proj((gate * (long + v * mixer.bias[:, None, None])).movedim(1, -1))
