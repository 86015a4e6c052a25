"""Window MLP as a grouped convolution over the positions of all heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.window import merge, partition
from saccade.papers.swin_mlp import ShiftedWindowMlp


def shifted_window_mlp(mixer: ShiftedWindowMlp, x: Tensor) -> Tensor:
    """Windows copied head by head, one group of the convolution for each."""
    B, H, W, C = x.shape
    (top, bottom), (left, right) = mixer.overhang((H, W))
    x = F.pad(x, (0, 0, left, right, top, bottom))
    window, heads = (mixer.side, mixer.side), mixer.heads
    windows = partition(x, window).unflatten(-1, (heads, -1)).transpose(1, 2)  # (G, heads, N, d)
    mixed = F.conv1d(windows.flatten(1, 2), mixer.weight.flatten(0, 1)[..., None], mixer.bias, groups=heads)
    out = mixed.unflatten(1, (heads, -1)).transpose(1, 2).flatten(2)
    return merge(out, window, x.shape[1:3])[:, top : top + H, left : left + W]
