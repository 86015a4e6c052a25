"""The floor of a forward, from arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.tools.measure import count_macs
from saccade.tools.roofline import Rates, floor, moved_bytes, rates, yardsticks


def test_bytes_of_layers_with_weights() -> None:
    """Input, weight, bias and output of each linear layer; what stands between them is free."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    first, second = 10 * 8 + 8 * 16 + 16 + 10 * 16, 10 * 16 + 16 * 4 + 10 * 4
    assert moved_bytes(model, (torch.randn(10, 8),)) == 4 * (first + second)


def test_floor_is_the_longer_of_arithmetic_and_bytes() -> None:
    model, x = nn.Linear(8, 16, bias=False), torch.randn(10, 8)
    macs, moved = 10 * 8 * 16, 4 * (10 * 8 + 8 * 16 + 10 * 16)
    counted = count_macs(model, (x,)), moved_bytes(model, (x,))
    assert floor(*counted, Rates(macs=1e3, bytes=1e9)) == pytest.approx(macs / 1e3)
    assert floor(*counted, Rates(macs=1e9, bytes=1e3)) == pytest.approx(moved / 1e3)


def test_rates_are_those_of_the_yardsticks() -> None:
    found = rates({"product": [1.0, 2.0, 3.0], "copy": [0.5]})
    assert found == Rates(3136 * 384 * 1536 / 2, 2 * 4 * 2**24 / 0.5)
    assert yardsticks()["product"]().shape == (3136, 1536)


class Choosing(nn.Linear):
    """Only the rows whose sum is positive go on: how many is known from the numbers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[: int((x.sum(1) > 0).sum().item())])


def test_a_forward_that_reads_its_data_is_counted_with_data() -> None:
    model = nn.Sequential(Choosing(8, 16, bias=False))
    x = torch.cat([torch.ones(3, 8), -torch.ones(7, 8)])
    assert moved_bytes(model, (x,)) == 4 * (10 * 8 + 8 * 16 + 3 * 16)
