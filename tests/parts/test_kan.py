"""Kolmogorov-Arnold layers against loops."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import SaccadeError
from saccade.parts.kan import KanLayer, SplineKanLayer, b_splines


def spline(knots, k, degree, x):
    """One B-spline by its definition."""
    if degree == 0:
        return float(knots[k] <= x < knots[k + 1])
    rising = (x - knots[k]) / (knots[k + degree] - knots[k])
    falling = (knots[k + degree + 1] - x) / (knots[k + degree + 1] - knots[k + 1])
    return rising * spline(knots, k, degree - 1, x) + falling * spline(knots, k + 1, degree - 1, x)


@pytest.mark.parametrize(("cells", "degree"), [(5, 3), (1, 0), (4, 1), (3, 2)])
def test_a_spline_layer_is_a_sum_of_functions_of_each_input(cells, degree):
    torch.manual_seed(0)
    layer = SplineKanLayer(3, 2, cells, degree, low=-1.5, high=2.0).double()
    layer.grid += torch.tensor([[0.0], [0.1], [0.3]])  # knots that differ from input to input
    torch.nn.init.normal_(layer.spline_scaler)
    x = torch.randn(4, 5, 3, dtype=torch.float64) * 2
    weight, scale, base = (value.detach() for value in (layer.spline_weight, layer.spline_scaler, layer.base_weight))

    def function(out, i, value):
        splines = sum(float(weight[out, i, k]) * spline(layer.grid[i].tolist(), k, degree, value)
                      for k in range(cells + degree))
        return float(base[out, i]) * value / (1 + math.exp(-value)) + float(scale[out, i]) * splines

    wanted = [[sum(function(out, i, float(row[i])) for i in range(3)) for out in range(2)] for row in x.view(-1, 3)]
    torch.testing.assert_close(layer(x).view(-1, 2), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_splines_sum_to_one_on_the_range_and_vanish_far_away():
    knots = SplineKanLayer(1, 1).double().grid
    inside = torch.linspace(-0.99, 0.99, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(b_splines(inside, knots, 3).sum(-1), torch.ones_like(inside), rtol=1e-5, atol=1e-5)
    assert b_splines(torch.tensor([[-9.0], [9.0]], dtype=torch.float64), knots, 3).abs().max() == 0


def test_without_scales():
    """The same functions, of weights that have the scales in them."""
    scaled, plain = SplineKanLayer(3, 2), SplineKanLayer(3, 2, scaled=False)
    torch.nn.init.normal_(scaled.spline_scaler)
    state = scaled.state_dict()
    state["spline_weight"] = state["spline_weight"] * state.pop("spline_scaler")[..., None]
    plain.load_state_dict(state)
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x), scaled(x))


def test_an_empty_range_is_refused():
    with pytest.raises(SaccadeError, match="from 1.0 to -1.0"):
        SplineKanLayer(3, 2, low=1.0, high=-1.0)


def test_a_switch_layer_is_a_sum_of_bumps_of_each_input():
    """Against loops; in pieces, without gradients, the same as whole."""
    torch.manual_seed(0)
    layer = KanLayer(3, 2, low=-1.0, high=1.0, knots=4, width=0.5).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    normed, weight = layer.norm(x).detach(), layer.linear.weight.detach().view(2, 3, 4)
    wanted = torch.tensor([[sum(
        float(weight[out, i, g]) * (1 - math.tanh((float(normed[row, i]) - (-1 + 2 * g / 3)) / 0.5) ** 2)
        for i in range(3) for g in range(4)) for out in range(2)] for row in range(5)], dtype=torch.float64)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-7)
    long = torch.randn(2, 300, 400, 3, dtype=torch.float64)
    with torch.no_grad():
        pieces = layer(long)
    torch.testing.assert_close(pieces, layer(long))
