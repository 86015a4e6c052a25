"""How much of the image a network uses: the effective receptive field and its size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.attribution.classifier import evaluating
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone


def effective_receptive_field(model: Backbone, images: Iterable[Tensor]) -> Tensor:
    """Contribution of each pixel to the centre of the last map: (H, W), the mean over images.

        s = sum over input channels of relu(d (sum over channels of relu(map at its centre)) / d input)

    `images` gives batches (B, C, H, W) of one size. Source: Ding et al., "Scaling Up Your Kernels to 31x31" (RepLKNet),
    2022, section 4.3, as used by Zhang et al., "Scaling Up Your Kernels", 2024. Raises SaccadeError for no image.
    """
    total, count = None, 0
    with evaluating(model):
        for batch in images:
            leaf = batch.detach().requires_grad_()
            last = model.features(leaf)[-1]
            centre = last[..., last.shape[-2] // 2, last.shape[-1] // 2]
            (gradient,) = torch.autograd.grad(centre.relu().sum(), leaf)
            seen = gradient.relu().sum((0, 1))
            total, count = seen if total is None else total + seen, count + len(batch)
    if total is None:
        raise SaccadeError("effective_receptive_field: there is no image; give at least one batch (B, C, H, W)")
    return total / count


def area_ratio(field: Tensor, share: float) -> float:
    """The part of the image that the smallest centred square holding `share` of the field covers, in (0, 1].

    (H, W) with 0 < share < 1; squares grow by a pixel on each side and stop at the borders.
    """
    if not 0 < share < 1:
        raise SaccadeError(f"share={share}: give a number between 0 and 1")
    height, width = field.shape
    whole = float(field.sum())
    for half in range(max(height, width)):
        rows = slice(max(height // 2 - half, 0), height // 2 + half + 1)
        columns = slice(max(width // 2 - half, 0), width // 2 + half + 1)
        square = field[rows, columns]
        if float(square.sum()) >= share * whole:
            return square.numel() / field.numel()
    return 1.0
