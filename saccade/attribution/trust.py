"""How far a map can be trusted: does the score follow what it shows, and does the map follow the model?

    deletion(model, image, maps, target)        # low: without the pixels shown first the class is soon gone
    insertion(model, image, maps, target)       # high: the pixels shown first suffice for the class
    rank_correlation(maps, explain(shuffled(model), image, method, target).maps)     # near 0, else it shows the picture
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attribution.classifier import evaluating
from saccade.core.errors import SaccadeError
from saccade.ops.blur import gaussian_blur
from saccade.parts.scores import scores


def deletion(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, steps: int = 32) -> Tensor:
    """Area under p(target) while pixels turn to 0 (the mean colour), those of the largest value first: (B,).

    image (B, C, H, W), maps (B, H, W), target (B,); each of `steps` steps takes as many pixels, ties in reading order.
    Petsiuk, Das, Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018, section 4.
    """
    return _area(model, image, torch.zeros_like(image), maps, target, steps)


def insertion(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor, steps: int = 32) -> Tensor:
    """Area under p(target) while pixels come out of the blurred picture, those of the largest value first: (B,).

    The blur is a Gaussian of one sixteenth of the shorter side. As `deletion` otherwise.
    """
    deviation = min(image.shape[2:]) / 16
    radius = max(1, min(round(3 * deviation), min(image.shape[2:]) - 1))
    start = gaussian_blur(F.pad(image, (radius,) * 4, mode="reflect"), deviation, radius)
    return _area(model, start, image, maps, target, steps)


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model that has learned nothing: the entries of each parameter stand in random order.

    Their distribution stays, so that no scale explodes. Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim, Sanity Checks
    for Saliency Maps, 2018, randomise layer after layer; this is their last step, all layers at once.
    """
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of two maps (B, H, W), in [-1, 1], equal values sharing their mean rank: (B,).

    NaN where a map is flat.
    """
    if one.shape != other.shape:
        raise SaccadeError(f"maps of {tuple(one.shape)} and {tuple(other.shape)} cannot be compared: give equal shapes")
    first, second = (torch.stack([_ranks(each) for each in maps.flatten(1)]) for maps in (one, other))
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    return (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]


def _area(model: nn.Module, start: Tensor, end: Tensor, maps: Tensor, target: Tensor, steps: int) -> Tensor:
    """The mean of p(target), by trapezia, while `start` turns into `end` in the order of falling values of the maps."""
    if steps < 1:
        raise SaccadeError(f"steps is {steps}: give 1 or more")
    if maps.shape != (len(start), *start.shape[2:]):
        raise SaccadeError(f"maps {tuple(maps.shape)} do not fit images {tuple(start.shape)}: give (B, H, W)")
    place = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(maps)
    edges = torch.linspace(0, place[0].numel(), steps + 1, device=maps.device)
    found = []
    with evaluating(model), torch.no_grad():
        for before, after, where, wanted in zip(start, end, place, target.tolist(), strict=True):
            mixed = torch.where(where < edges[:, None, None, None], after, before)
            found.append(torch.cat([scores(model, part).softmax(1)[:, wanted] for part in mixed.split(64)]))
    heights = torch.stack(found)
    return (heights[:, 1:] + heights[:, :-1]).mean(1) / 2
