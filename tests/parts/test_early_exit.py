"""Thresholds for a budget, beside a search by hand."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError
from saccade.parts.early_exit import anytime_curve, budgeted_curve, exits_at, mean_cost, solve_thresholds

COSTS = (1.0, 2.0, 4.0)


def sample(count=2000):
    """Half of the images are easy for every exit, half grow easier; confidences are the chance to be right."""
    generator = torch.Generator().manual_seed(0)
    easy = torch.rand(count, generator=generator, dtype=torch.float64) < 0.5
    noise = 0.09 * torch.rand(3, count, generator=generator, dtype=torch.float64)
    sure = torch.where(easy, 0.9, torch.tensor([[0.2], [0.45], [0.8]], dtype=torch.float64)) + noise
    return sure, torch.rand(3, count, generator=generator, dtype=torch.float64) < sure


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 3.1, 3.9])
def test_a_budget_is_met_and_used(budget):
    sure, _ = sample()
    cost = mean_cost(exits_at(sure, solve_thresholds(sure, COSTS, budget)), COSTS)
    assert budget - 0.01 < cost <= budget


def test_each_image_stops_at_its_first_sure_exit():
    sure, _ = sample(200)
    thresholds = solve_thresholds(sure, COSTS, 2.2)
    wanted = [next(k for k in range(3) if k == 2 or float(sure[k, image]) >= thresholds[k]) for image in range(200)]
    assert exits_at(sure, thresholds).tolist() == wanted
    assert len(set(wanted)) == 3


def test_the_whole_budget_lets_nobody_leave():
    sure, _ = sample(50)
    assert exits_at(sure, solve_thresholds(sure, COSTS, 4.0)).tolist() == [2] * 50


def test_curves():
    """Where those that are surer are right more often, a mean cost buys more than stopping all at one exit."""
    sure, right = sample()
    fixed = anytime_curve(right, COSTS)
    assert [point.cost for point in fixed] == list(COSTS)
    assert fixed[1].accuracy == pytest.approx(float(right[1].double().mean()))
    points = budgeted_curve(sure, right, COSTS, [1.5, 2.0, 4.0])
    assert points[1].accuracy > fixed[1].accuracy + 0.05 and points[-1] == fixed[-1]
    other, _ = sample(300)
    assert budgeted_curve(sure, right, COSTS, [2.0], validation=other)[0].cost == pytest.approx(2.0, abs=0.3)


def test_what_cannot_be_solved_is_said():
    sure, _ = sample(10)
    for arguments, words in (((sure, COSTS, 0.5), "under the cost of the first exit"),
                             ((sure, (1.0, 2.0), 1.5), "a cost for each exit"), ((sure, (2.0, 1.0, 3.0), 2.5), "fall")):
        with pytest.raises(SaccadeError, match=words):
            solve_thresholds(*arguments)
