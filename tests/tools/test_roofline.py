"""The floor of a forward, from arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.core.site import Site
from saccade.papers.vim import BidirectionalMamba
from saccade.tools.measure import count_macs
from saccade.tools.roofline import Rates, floor, moved_bytes, rates, scan_states, yardsticks


def test_bytes_of_layers_with_weights() -> None:
    """Input, weight, bias and output of each linear layer; what stands between them is free."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    first, second = 10 * 8 + 8 * 16 + 16 + 10 * 16, 10 * 16 + 16 * 4 + 10 * 4
    assert moved_bytes(model, (torch.randn(10, 8),)) == 4 * (first + second)


def test_floor_is_the_longer_of_arithmetic_and_bytes() -> None:
    model, x = nn.Linear(8, 16, bias=False), torch.randn(10, 8)
    macs, moved = 10 * 8 * 16, 4 * (10 * 8 + 8 * 16 + 10 * 16)
    counted = count_macs(model, (x,)), moved_bytes(model, (x,))
    assert floor(*counted, Rates(macs=1e3, bytes=1e9, states=1e9)) == pytest.approx(macs / 1e3)
    assert floor(*counted, Rates(macs=1e9, bytes=1e3, states=1e9)) == pytest.approx(moved / 1e3)


def test_rates_are_those_of_the_yardsticks() -> None:
    found = rates({"product": [1.0, 2.0, 3.0], "copy": [0.5], "scan": [0.25]})
    assert found == Rates(3136 * 384 * 1536 / 2, 2 * 4 * 2**24 / 0.5, 32 * 2**15 / 0.25)
    assert yardsticks()["product"]().shape == (3136, 1536)
    assert yardsticks()["scan"]().shape == (2**15,)


def test_states_of_scans_are_arithmetic_beside_products() -> None:
    """Two directions of 7 tokens and 12 channels, 5 numbers a channel, for 3 images."""
    mixer = BidirectionalMamba(Site(dim=6, heads=1), states=5)
    states = 3 * 2 * 7 * 12 * 5
    assert scan_states(mixer, (torch.randn(3, 7, 6),)) == states
    assert scan_states(nn.Linear(6, 6), (torch.randn(3, 7, 6),)) == 0
    assert floor(10, 10, Rates(macs=1e3, bytes=1e9, states=1e2), states) == pytest.approx(10 / 1e3 + states / 1e2)


class Choosing(nn.Linear):
    """Only the rows whose sum is positive go on: how many is known from the numbers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[: int((x.sum(1) > 0).sum().item())])


def test_a_forward_that_reads_its_data_is_counted_with_data() -> None:
    model = nn.Sequential(Choosing(8, 16, bias=False))
    x = torch.cat([torch.ones(3, 8), -torch.ones(7, 8)])
    assert moved_bytes(model, (x,)) == 4 * (10 * 8 + 8 * 16 + 3 * 16)
