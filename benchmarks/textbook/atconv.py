"""Attentive convolution as its figure draws it: all tokens projected, neighbourhoods unfolded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.atconv import AttentiveConvolution


def attentive_convolution(mixer: AttentiveConvolution, x: Tensor) -> Tensor:
    """sum over the k^2 neighbours of K_c times what they hold, (B, C, k^2, N) numbers in memory."""
    B, H, W, C = x.shape
    bins = F.adaptive_avg_pool1d(mixer.kernel_proj(x).flatten(1, 2).mT, mixer.bins)
    kernels = mixer.kernel_gen(F.gelu(bins))
    kernels = kernels - mixer.inhibition.sigmoid()[:, None] * kernels.mean(-1, keepdim=True)
    maps = mixer.x_proj(x).movedim(-1, 1)
    patches = F.unfold(maps, mixer.kernel, padding=mixer.kernel // 2).view(B, C, mixer.bins, H * W)
    return mixer.proj((kernels[..., None] * patches).sum(2).mT.reshape(B, H, W, C))
