"""ContMix with its neighbourhoods copied out and a kernel written for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.parts.contmix import SUMMARY, ContMix


def contmix(mixer: ContMix, x: Tensor) -> Tensor:
    """softmax(W (q k^T) + b) v of each token's neighbours, k of 7 x 7 cells (alone, no side under the kernel)."""
    B, H, W, C = x.shape
    heads = mixer.heads
    cells = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), SUMMARY).flatten(2).transpose(1, 2)
    q, k = (layer(part).view(B, -1, heads, C // 2 // heads).transpose(1, 2)
            for layer, part in ((mixer.query, x), (mixer.key, cells)))
    kernels = mixer.kernel_proj(q * mixer.scale @ k.transpose(-2, -1))  # (B, h, N, entries)
    values = mixer.value(x).view(B, H * W, 2, heads, -1).permute(2, 0, 3, 1, 4)
    out = []
    for kernel, value, side, bias in zip(kernels.split([side**2 for side in mixer.kernels], -1), values, mixer.kernels,
                                         mixer.biases, strict=True):
        near = [(torch.arange(size) - side // 2).clamp(0, size - side)[:, None] + torch.arange(side) for size in (H, W)]
        tokens = (near[0][:, None, :, None] * W + near[1][None, :, None, :]).flatten(0, 1).flatten(1)  # (N, k k)
        down, across = (at - torch.arange(len(at))[:, None] + side - 1 for at in near)
        logits = kernel + bias[:, down[:, None, :, None], across[None, :, None, :]].flatten(1, 2).flatten(2)
        out.append((logits.softmax(-1)[..., None, :] @ value[:, :, tokens]).squeeze(-2))
    return mixer.proj(torch.cat([part.transpose(1, 2).flatten(2) for part in out], -1).view(x.shape))
