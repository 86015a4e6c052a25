"""Outlook attention with its windows unfolded and folded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.volo import Outlook


def outlook(mixer: Outlook, x: Tensor) -> Tensor:
    """fold(softmax(logits(pool(x))) unfold(v)): three copies of each window of values in memory."""
    B, H, W, C = x.shape
    K, h, step = mixer.kernel, mixer.heads, mixer.stride
    values = F.unfold(mixer.v(x).permute(0, 3, 1, 2), K, padding=K // 2, stride=step)
    values = values.view(B, h, C // h, K * K, -1).permute(0, 1, 4, 3, 2)
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), step, step, ceil_mode=True).permute(0, 2, 3, 1)
    logits = mixer.logits(pooled).view(B, -1, h, K * K, K * K).transpose(1, 2) * (C // h) ** -0.5
    mixed = (logits.softmax(-1) @ values).permute(0, 1, 4, 3, 2).reshape(B, C * K * K, -1)
    return mixer.proj(F.fold(mixed, (H, W), K, padding=K // 2, stride=step).permute(0, 2, 3, 1))
