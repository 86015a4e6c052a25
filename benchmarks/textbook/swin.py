"""Attention inside windows that shift, with its weights and its mask written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.swin import ShiftedWindow, shift_at
from saccade.parts.window import region_mask


def shifted_window(mixer: ShiftedWindow, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + B + mask) v in each window of the rolled, padded grid."""
    B, H, W, C = x.shape
    (h, w), shift = mixer.window, shift_at((H, W), mixer.window, mixer.shift)
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w
    x = x.roll((-shift, -shift), (1, 2)).view(B, rows, h, columns, w, C).transpose(2, 3).reshape(-1, h * w, C)
    q, k, v = mixer.qkv(x).view(-1, h * w, 3, mixer.heads, C // mixer.heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * (C // mixer.heads) ** -0.5 + mixer.bias()
    if shift:
        mask = region_mask((rows * h, columns * w), mixer.window, (shift, shift), x.device)
        logits = (logits.unflatten(0, (B, -1)) + mask[:, None]).flatten(0, 1)
    x = mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = x.view(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)
    return x.roll((shift, shift), (1, 2))[:, :H, :W]
