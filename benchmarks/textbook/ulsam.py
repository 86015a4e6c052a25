"""Subspace attention, a subspace at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.ulsam import SubspaceAttention


def subspace_attention(mixer: SubspaceAttention, x: Tensor) -> Tensor:
    """x_s + softmax(relu(norm(conv_1x1(maxpool(relu(norm(depthwise_1x1(x_s)))))))) x_s, with x_s of C / g channels."""
    (dws, bn_dws, _), (point, bn_point, _) = mixer.scale, mixer.gather
    outs, wide = [], x.shape[-1] // mixer.subspaces
    for number, part in enumerate(x.permute(0, 3, 1, 2).chunk(mixer.subspaces, 1)):
        channels = slice(number * wide, (number + 1) * wide)
        y = F.conv2d(part, dws.weight[channels], dws.bias[channels], groups=wide)
        y = F.max_pool2d(norm(bn_dws, channels, y).relu(), 3, stride=1, padding=1)
        one = slice(number, number + 1)
        y = norm(bn_point, one, F.conv2d(y, point.weight[one], point.bias[one])).relu()
        outs.append(part + y.flatten(2).softmax(-1).view_as(y) * part)
    return torch.cat(outs, 1).permute(0, 2, 3, 1)


def norm(layer: torch.nn.BatchNorm1d, channels: slice, x: Tensor) -> Tensor:
    """Some channels of a batch norm in evaluation."""
    return F.batch_norm(x, layer.running_mean[channels], layer.running_var[channels], layer.weight[channels],
                        layer.bias[channels], eps=layer.eps)
