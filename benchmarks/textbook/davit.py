"""DaViT's two attentions, with the weights of each window and of each group of channels written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.davit import ChannelGroup
from saccade.parts.window import WindowAttention


def window(mixer: WindowAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in each window of the padded grid."""
    B, H, W, C = x.shape
    h, w = mixer.window
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w
    x = x.view(B, rows, h, columns, w, C).transpose(2, 3).reshape(-1, h * w, C)
    q, k, v = mixer.qkv(x).view(-1, h * w, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5).softmax(-1)
    x = mixer.proj((weights @ v).transpose(1, 2).flatten(2))
    return x.view(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)[:, :H, :W]


def channel_group(mixer: ChannelGroup, x: Tensor) -> Tensor:
    """softmax(k^T v / sqrt(d)) q^T, the channels of a group as its tokens: nothing here is larger than the map."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    weights = (k.transpose(-2, -1) @ v * (C // mixer.heads) ** -0.5).softmax(-1)
    return mixer.proj((weights @ q.transpose(-2, -1)).permute(0, 3, 1, 2).reshape(x.shape))
