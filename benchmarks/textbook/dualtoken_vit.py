"""The two branches of a DualToken block, channels first, with all weights written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.dualtoken_vit import CrossAttention, DualToken


def dual_token(mixer: DualToken, x: Tensor) -> Tensor:
    """X_local + softmax(Q(X_local) K(G')^T / sqrt(d)) V(G')."""
    conv, norm, mlp, scale = mixer.local
    image = x.permute(0, 3, 1, 2).contiguous()
    mixed = F.conv2d(image, conv.weight, conv.bias, padding=3, groups=image.shape[1]).permute(0, 2, 3, 1)
    x = x + scale(mlp.fc2(F.gelu(mlp.fc1(norm(mixed)))))
    small = x.permute(0, 3, 1, 2)
    for conv, linear in zip(mixer.downsample[::3], mixer.downsample[1::3]):
        small = F.conv2d(small, conv.weight, conv.bias, padding=1, groups=small.shape[1])
        small = F.conv2d(small, linear.weight[:, :, None, None], linear.bias)
        small = F.avg_pool2d(small, 2, ceil_mode=True, count_include_pad=False)
    small = F.adaptive_avg_pool2d(small, mixer.size).flatten(2).transpose(1, 2)
    alpha = mixer.alpha.sigmoid()
    tokens = alpha * mixer.tokens + (1 - alpha) * attention(mixer.aggregate, small, small)
    tokens = tokens + mixer.mlp(mixer.norm(tokens))
    return x + attention(mixer.broadcast, x.flatten(1, 2), tokens).view(x.shape)


def attention(layer: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    B, N, C = x.shape
    q = layer.q(x).view(B, N, layer.heads, -1).transpose(1, 2)
    k, v = layer.kv(context).view(B, -1, 2, layer.heads, C // layer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // layer.heads) ** -0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
