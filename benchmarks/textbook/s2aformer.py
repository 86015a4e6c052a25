"""Strip attention with its weights written out, reduction channels first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.s2aformer import StripAttention


def strip_attention(mixer: StripAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, all N x M weights in memory."""
    B, H, W, C = x.shape
    r, thin = mixer.reduction, mixer.heads * mixer.qk_dim
    reduced = x
    if r > 1:
        conv, norm = mixer.reduce
        image = F.pad(x.permute(0, 3, 1, 2), (0, -W % r, 0, -H % r))
        reduced = norm(F.conv2d(image, conv.weight, conv.bias, stride=r, groups=C).permute(0, 2, 3, 1))
    q = mixer.q(x).view(B, H * W, mixer.heads, -1).transpose(1, 2)
    kv = mixer.kv(reduced).flatten(1, 2)
    k = kv[..., :thin].reshape(B, -1, mixer.heads, mixer.qk_dim).transpose(1, 2)
    v = kv[..., thin:].reshape(B, -1, mixer.heads, C // mixer.heads).transpose(1, 2)
    weights = (q @ k.transpose(-2, -1) * mixer.qk_dim**-0.5).softmax(-1)
    return mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
