"""TiC's mixer with its windows unfolded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.tic import ShiftedMsaConv


def msa_conv(mixer: ShiftedMsaConv, x: Tensor) -> Tensor:
    """Keys and values of all windows copied out by unfold, zeros around the grid, then softmax and convolution."""
    B, H, W, C = x.shape
    h, K = mixer.heads, mixer.kernel**2
    q, k, v = mixer.qkv(x).permute(0, 3, 1, 2).chunk(3, 1)
    k, v = (torch.cat([head.roll(steps, (2, 3)) for head, steps in zip(one.chunk(h, 1), mixer.shifts, strict=True)], 1)
            for one in (k, v))
    sources = [(k, v, mixer.dilation)]
    if mixer.pool is not None:
        k, v = (F.interpolate(F.avg_pool2d(one, 2, ceil_mode=True, count_include_pad=False), scale_factor=2)
                [:, :, :H, :W] for one in (k, v))
        sources.append((k, v, 2 * mixer.dilation))
    windows = [[F.unfold(one, mixer.kernel, dilation=step, padding=mixer.kernel // 2 * step)
                .view(B, h, C // h, K, H * W) for one in (k, v)] for k, v, step in sources]
    keys, values = (torch.cat(part, 3) for part in zip(*windows, strict=True))
    scores = (q.reshape(B, h, C // h, 1, H * W) * keys).sum(2) * (C // h) ** -0.5
    mixed = (scores.softmax(2)[:, :, None] * values).sum(3).view(B, C, H, W)
    return mixer.conv(x + mixed.permute(0, 2, 3, 1)).relu()
