"""Early exit: how sure an exit is, thresholds for a budget, and what a network of exits is worth at each cost.

(Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", 2018, sections 3 and 5.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError

STEPS = 60  # bisections of the share that exits, beyond the precision of float64


class Point(NamedTuple):
    """What a network of exits is worth: the mean cost of an image and the share of images that are right."""

    cost: float
    accuracy: float


def confidence(scores: Tensor) -> Tensor:
    """The largest probability, softmax(scores): (..., classes) -> (...)."""
    return scores.softmax(-1).amax(-1)


def exits_at(confidences: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit (N,) of each image: the first of E whose confidence (E, N) reaches its threshold, else the last."""
    sure = confidences >= torch.tensor(thresholds, dtype=torch.float64, device=confidences.device)[:, None]
    sure[-1] = True
    return sure.to(torch.uint8).argmax(0)


def solve_thresholds(confidences: Tensor, costs: Sequence[float], budget: float) -> list[float]:
    """Thresholds (E,) under which the images of a validation set cost at most `budget` each, in the mean.

    confidences (E, N) of each exit, costs (E,) of an image that leaves there, rising. Exit k of E is meant to take the
    share q^k / sum_j q^j of the images, its surest of those left; q is bisected so that the mean cost comes nearest to
    the budget from below. A budget of the last exit's cost or more lets nobody leave early. Raises SaccadeError where
    the budget is under the first exit's cost.
    """
    _check(confidences, costs)
    if budget < costs[0]:
        raise SaccadeError(f"budget={budget:g} is under the cost of the first exit, {costs[0]:g}; give at least that")
    if budget >= costs[-1]:
        return [float("inf")] * (len(costs) - 1) + [0.0]
    low, high = 0.0, 1.0  # q / (1 + q): 0 sends all to the first exit, 1 to the last
    best = _thresholds(confidences, 0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = _thresholds(confidences, middle)
        if mean_cost(exits_at(confidences, found), costs) <= budget:
            best, low = found, middle
        else:
            high = middle
    return best


def mean_cost(exits: Tensor, costs: Sequence[float]) -> float:
    """The mean cost of images that leave at `exits` (N,)."""
    return float(torch.tensor(costs, dtype=torch.float64, device=exits.device)[exits.long()].mean())


def budgeted_curve(
    confidences: Tensor, right: Tensor, costs: Sequence[float], budgets: Sequence[float],
    validation: Tensor | None = None,
) -> list[Point]:
    """Cost and accuracy under each budget; thresholds from the confidences `validation` (E, N') of other images.

    `right` (E, N) says where an exit has the right class. Without `validation` thresholds come from the same images.
    """
    _check(confidences, costs)
    points = []
    for budget in budgets:
        solved = solve_thresholds(confidences if validation is None else validation, costs, budget)
        exits = exits_at(confidences, solved).long()
        points.append(Point(mean_cost(exits, costs), float(right.gather(0, exits[None]).double().mean())))
    return points


def anytime_curve(right: Tensor, costs: Sequence[float]) -> list[Point]:
    """Cost and accuracy where all images stop at the same exit: `right` (E, N)."""
    return [Point(float(cost), float(share)) for cost, share in zip(costs, right.double().mean(1), strict=True)]


def _thresholds(confidences: Tensor, place: float) -> list[float]:
    """Thresholds that share the images by powers of q = place / (1 - place)."""
    last, count = confidences.shape
    powers = torch.tensor([place**k * (1 - place) ** (last - 1 - k) for k in range(last)], dtype=torch.float64)
    shares = (powers / powers.sum()).tolist()
    left = torch.ones(count, dtype=torch.bool, device=confidences.device)
    found: list[float] = []
    for sure, share in zip(confidences[:-1], shares, strict=False):
        wanted = min(round(share * count), int(left.sum()))
        found.append(float(sure[left].topk(wanted).values[-1]) if wanted else float("inf"))
        left &= sure < found[-1]
    return [*found, 0.0]


def _check(confidences: Tensor, costs: Sequence[float]) -> None:
    if confidences.ndim != 2 or len(confidences) != len(costs) or not confidences.numel():
        raise SaccadeError(f"confidences {tuple(confidences.shape)} and {len(costs)} costs: give (exits, images) and a "
                           "cost for each exit")
    if any(later < earlier for earlier, later in zip(costs, costs[1:], strict=False)):
        raise SaccadeError(f"costs {list(costs)} fall from one exit to the next; give the cost up to each exit")
