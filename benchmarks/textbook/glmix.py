"""Slots with unit tokens, both softmaxes and the slots' attention written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.textbook.vit import attention
from saccade.papers.glmix import GLMix


def glmix(mixer: GLMix, x: Tensor) -> Tensor:
    """Group by softmax over the tokens, attend, dispatch by softmax over the slots; the convolution beside, in NCHW."""
    image = x.movedim(-1, 1).contiguous()
    seeds = F.adaptive_avg_pool2d(image, mixer.coarse).flatten(2).transpose(1, 2)
    tokens = image.flatten(2).transpose(1, 2)
    logits = F.normalize(seeds, dim=-1) @ (mixer.scale * F.normalize(tokens, dim=-1).transpose(1, 2))
    slots = attention(mixer.attention, logits.softmax(-1) @ tokens)
    out = (logits.transpose(1, 2).softmax(-1) @ slots).transpose(1, 2).reshape(image.shape)
    first, depthwise, last = mixer.local
    near = F.conv2d(image, first.weight[:, :, None, None], first.bias)
    near = F.conv2d(near, depthwise.weight, depthwise.bias, padding=depthwise.padding, groups=image.shape[1])
    near = F.conv2d(near, last.weight[:, :, None, None], last.bias)
    return (out + near).movedim(1, -1).contiguous()
