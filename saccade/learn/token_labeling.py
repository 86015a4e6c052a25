"""Token labeling: every token has a label of its own, and boxes of tokens change places between images (mix-token).

    box = random_box(grid)                                   # of the last map, (14, 14) for 224 pixels
    scores, labels = mixed_scores(model, images, box)
    loss = token_label_loss(scores, labels, targets, token_targets, share_outside(box, grid))

The loss is H(class targets, scores) + H(token targets, labels) / 2, H the cross entropy with soft targets. Images are
mixed behind the stem, so that no convolution sees an edge, and the tokens' scores are put back where they belong before
they are compared with labels; the class token is compared with the mixture of both images' targets.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.features import FeatureInfo

Box = tuple[slice, ...]


@runtime_checkable
class TokenLabelled(Protocol):
    """A model that goes on from its stem's map and, from what that gives, scores the image and each of its tokens."""

    stem: Callable[[Tensor], Tensor]
    feature_info: FeatureInfo

    def after_stem(self, x: Tensor) -> Tensor: ...

    def label_scores(self, features: Tensor, /) -> tuple[Tensor, Tensor]: ...


def random_box(grid: tuple[int, ...], generator: torch.Generator | None = None) -> Box:
    """A box of tokens of a grid, as CutMix draws its own: of uniform volume but for what edges cut off."""
    side = float(torch.rand((), generator=generator)) ** (1 / len(grid))
    box = []
    for size in grid:
        half, middle = int(size * side) // 2, int(torch.randint(size, (), generator=generator))
        box.append(slice(max(middle - half, 0), min(middle + half, size)))
    return tuple(box)


def share_outside(box: Box, grid: tuple[int, ...]) -> float:
    """The share of a grid that a box leaves out."""
    return 1 - prod(part.stop - part.start for part in box) / prod(grid)


def swapped(x: Tensor, box: Box) -> Tensor:
    """(B, *grid, C) with what is in the box taken from the image as far from the other end of the batch."""
    place = (slice(None), *box)
    mixed = x.clone()
    mixed[place] = x.flip(0)[place]
    return mixed


def mixed_scores(model: TokenLabelled, image: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Class scores (B, classes) of the mixed images, and scores (B, *grid, classes) of tokens, unmixed.

    `box` is of the last map; on the stem's it is as many times larger. Raises SaccadeError where the model's head does
    not read tokens, or the stem's map is no multiple of the last.
    """
    if not isinstance(model, TokenLabelled):
        raise SaccadeError(f"{type(model).__name__} does not score its tokens: choose a model like volo_d1 or svt_s")
    x = model.stem(image)
    step = model.feature_info[-1]["reduction"] // model.feature_info[0]["reduction"]
    if any(side % step for side in x.shape[1:-1]):
        raise SaccadeError(f"the stem's map {tuple(x.shape[1:-1])} is no multiple of {step}: choose another image size")
    mixed = swapped(x, tuple(slice(part.start * step, part.stop * step) for part in box))
    scores, labels = model.label_scores(model.after_stem(mixed))
    return scores, swapped(labels.unflatten(1, tuple(side // step for side in x.shape[1:-1])), box)


def token_label_loss(
    scores: Tensor, labels: Tensor, targets: Tensor, token_targets: Tensor, share: float = 1.0, weight: float = 0.5
) -> Tensor:
    """H(share t + (1 - share) t of the other image, scores) + weight H(token targets, labels).

    `targets` (B, classes) and `token_targets` (B, *grid, classes) are probabilities of the images before mixing.
    """
    of_class = F.cross_entropy(scores, share * targets + (1 - share) * targets.flip(0))
    return of_class + weight * F.cross_entropy(labels.flatten(0, -2), token_targets.flatten(0, -2))
