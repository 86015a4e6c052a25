"""Images as patches of pixels: what masked pre-training hides and guesses."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError


def patches_of(image: Tensor, patch: int) -> Tensor:
    """(B, C, *size) -> (B, N, C patch^n), for sides that are multiples of `patch`."""
    rank = image.ndim - 2
    for axis in range(rank):
        image = image.unflatten(2 + 2 * axis, (-1, patch))
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    return image.permute(order).flatten(1 + rank).flatten(1, rank)


def image_of(patches: Tensor, patch: int, grid: tuple[int, ...]) -> Tensor:
    """Undo `patches_of`: (B, N, C patch^n) -> (B, C, *size)."""
    rank = len(grid)
    x = patches.unflatten(2, (-1, *[patch] * rank)).unflatten(1, grid)
    x = x.permute([0, 1 + rank, *(axis for pair in range(rank) for axis in (1 + pair, 2 + rank + pair))])
    for axis in range(rank):
        x = x.flatten(2 + axis, 3 + axis)
    return x


def normalised(patches: Tensor) -> Tensor:
    """Pixels less the mean of their patch, by its standard deviation: (B, N, P) -> same.

    (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022, section 3.)
    """
    mean, spread = _mean_and_spread(patches)
    return (patches - mean) / spread


def denormalised(guess: Tensor, patches: Tensor) -> Tensor:
    """Undo `normalised`, with the means and spreads of the true `patches`."""
    mean, spread = _mean_and_spread(patches)
    return guess * spread + mean


def _mean_and_spread(patches: Tensor) -> tuple[Tensor, Tensor]:
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def random_mask(batch: int, tokens: int, ratio: float, device: torch.device) -> Tensor:
    """(B, N) bool: the share `ratio` of the tokens of each image, at random, as many in each (at least 1)."""
    order = torch.rand(batch, tokens, device=device).argsort(1)
    return order < max(1, round(ratio * tokens))


def hidden_patches(method: str, image: Tensor, patch: int, ratio: float) -> Tensor:
    """(B, *grid) bool: `random_mask` over the whole patches of images (B, C, *size)."""
    grid = whole_patches(method, image, patch)
    return random_mask(len(image), torch.Size(grid).numel(), ratio, image.device).unflatten(1, grid)


def seen_numbers(hidden: Tensor) -> Tensor:
    """(B, M): the numbers of the patches that are not `hidden` (B, N), as many in each image."""
    return (~hidden).nonzero()[:, 1].view(len(hidden), -1)


def check_ratio(method: str, ratio: float) -> float:
    """The share of patches to hide; raises where it leaves none, or hides none."""
    if not 0 < ratio < 1:
        raise SaccadeError(f"{method}: ratio={ratio}; the share of patches to hide lies between 0 and 1")
    return ratio


def whole_patches(method: str, image: Tensor, patch: int) -> tuple[int, ...]:
    """The grid of patches of an image (B, C, *size); raises where a side is no multiple of the patch."""
    size = tuple(image.shape[2:])
    if any(side % patch for side in size):
        raise SaccadeError(f"{method}: {' x '.join(map(str, size))} pixels are no whole number of patches of {patch}: "
                           "choose an img_size that is a multiple")
    return tuple(side // patch for side in size)
