"""Polyline path masked attention, decomposed, with its masks as N x N and its weights once an order of the axes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.rotary import rotate
from saccade.papers.ppma import PolylinePath


def polyline_path(mixer: PolylinePath, x: Tensor) -> Tensor:
    """The mean of attention along rows, then columns, and along columns, then rows, each softmax under its mask."""
    B, H, W, C = x.shape
    qkv = mixer.qkv(x).view(B, H, W, 3, mixer.heads, -1)
    q, k = rotate(qkv[..., :2, :, :]).unbind(3)
    v = qkv[..., 2, :, :]
    steps = F.softplus(mixer.steps(x.view(B, H, W, mixer.heads, -1)) + mixer.step_bias[:, None])
    alpha, beta = (steps * -mixer.log_rate.exp()[:, None]).unbind(-1)

    def along(v: Tensor, axis: int) -> Tensor:
        lines = [part.transpose(axis + 1, 2).transpose(2, 3) for part in (q, k, v)]  # (B, lines, heads, N, d)
        if axis == 0:
            lines = [part.permute(0, 2, 3, 1, 4) for part in (q, k, v)]
        sums = (alpha.permute(0, 1, 3, 2) if axis else beta.permute(0, 2, 3, 1)).cumsum(-1)
        mask = -(sums[..., :, None] - sums[..., None, :]).abs()
        out = ((lines[0] @ lines[1].transpose(-2, -1)) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ lines[2]
        return out.permute(0, 1, 3, 2, 4) if axis else out.permute(0, 3, 1, 2, 4)

    mixed = (along(along(v, 1), 0) + along(along(v, 0), 1)) / 2
    return mixer.proj(mixed.reshape(x.shape) + mixer.local(qkv[..., 2, :, :].reshape(x.shape)))
