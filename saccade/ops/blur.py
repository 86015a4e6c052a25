"""Gaussian blur of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(image: Tensor, deviation: float, radius: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 2 radius, W - 2 radius), each channel by itself; deviation and radius in pixels.

        y = sum over |i|, |j| <= radius of g_i g_j x[. + i, . + j],   g the normalised bell exp(-i^2 / (2 deviation^2))

    Pad the picture by `radius` first to keep its size.
    """
    away = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    bell = torch.softmax(-away.square() / (2 * deviation**2), 0)
    planes = F.conv2d(F.conv2d(image.flatten(0, 1)[:, None], bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))
    return planes[:, 0].unflatten(0, image.shape[:2])
