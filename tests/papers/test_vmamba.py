"""The cross-scan: its ways, their symmetry, other ranks."""

from __future__ import annotations

import pytest
import torch

from saccade import Site
from saccade.papers.vmamba import CrossScan, ordered, put_back
from tests.contracts.registered import randomised


def test_the_four_ways():
    numbers = torch.arange(6).view(1, 2, 3, 1, 1)  # 0 1 2 / 3 4 5
    ways = ordered(numbers, shared=True)[0, :, :, 0].tolist()
    assert ways == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize("grid", [(5,), (2, 3), (4, 1), (2, 3, 4)])
def test_ways_lead_back(grid):
    x = torch.randn(2, *grid, 1, 3)
    back = put_back(ordered(x, shared=True), grid)
    torch.testing.assert_close(back, 2 * len(grid) * x.squeeze(-2))


def test_a_transposed_image_with_its_ways_exchanged():
    """Rows of the transposed image are columns of the image."""
    site = Site(8, grid=(4, 5))
    mixer, other = randomised(CrossScan(site)).double(), CrossScan(site).double()
    state = mixer.state_dict()
    exchanged = [1, 0, 3, 2]
    for name in ("x_proj.weight", "dt_bias", "A_log", "D"):
        state[name] = state[name].unflatten(0, (4, -1))[exchanged].flatten(0, 1)
    state["dt_weight"] = state["dt_weight"][exchanged]
    state["conv.weight"] = state["conv.weight"].transpose(2, 3)
    other.load_state_dict(state)
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x.transpose(1, 2)), mixer(x).transpose(1, 2))


def test_sequences_and_volumes():
    for grid in [(7,), (3, 2, 4)]:
        mixer = randomised(CrossScan(Site(16, grid=grid)))
        out = mixer(torch.randn(2, *grid, 16))
        assert out.shape == (2, *grid, 16) and out.isfinite().all()
