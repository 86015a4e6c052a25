"""Translation variant convolution over unfolded patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.tvconv import TVConv


def tvconv(mixer: TVConv, x: Tensor) -> Tensor:
    """(W * unfold(x)).sum over the k x k neighbours, all patches in memory; on the native grid or with W resampled."""
    B, H, W, C = x.shape
    weights = F.interpolate(mixer.maps()[0].movedim(-1, 1), size=(H, W), mode="bilinear")  # (k^2, C, H, W)
    patches = F.unfold(x.permute(0, 3, 1, 2), mixer.kernel, padding=mixer.kernel // 2).view(B, C, -1, H, W)
    return (patches * weights.transpose(0, 1)).sum(2).permute(0, 2, 3, 1)
