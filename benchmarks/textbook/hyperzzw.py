"""HyperZZW as the paper writes it: a sum over the columns of one factor and the rows of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.hyperzzw import HyperZZW


def hyper_zzw(mixer: HyperZZW, x: Tensor) -> Tensor:
    """out[h, w] = sum_k (x W)[h, k] x'[k, w], channels first, x' resampled to a square."""
    image = x.permute(0, 3, 1, 2).contiguous()
    kernel = mixer.slow(tuple(x.shape[1:3])).permute(2, 0, 1).contiguous()
    right = F.interpolate(image.float(), size=(x.shape[2],) * 2, mode="bilinear").to(x.dtype)
    right = image if x.shape[1] == x.shape[2] else right
    return torch.einsum("bchk,bckw->bhwc", image * kernel, right).contiguous()
