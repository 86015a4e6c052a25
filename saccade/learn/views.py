"""Crops of pictures for training without labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core.optional import optional

v2 = optional("torchvision.transforms.v2", extra="train")


def views(img_size: int, count: int, flip: bool) -> Callable[[Tensor], Tensor]:
    """(3, S', S') uint8 -> (3, S, S), or, for `count` > 1, (count, 3, S, S): random resized crops, each by itself.

    A crop has 0.4 to 1 of the area (0.2 to 1 where there are several), perhaps mirrored; several also differ in
    brightness, contrast and saturation, and one in five is gray. (After Chen et al., SimCLR, 2020, section 3.)
    """
    parts = [v2.RandomResizedCrop(img_size, scale=(0.4 if count == 1 else 0.2, 1.0), antialias=True)]
    parts += [v2.RandomHorizontalFlip()] if flip else []
    if count > 1:
        parts += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2)], p=0.8), v2.RandomGrayscale(0.2)]
    one = v2.Compose(parts)

    def several(pixels: Tensor) -> Tensor:
        return torch.stack([one(pixels) for _ in range(count)])

    return one if count == 1 else several
