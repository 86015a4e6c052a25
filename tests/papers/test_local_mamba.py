"""LocalMamba's orders: which tokens come when, and the way back."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site
from saccade.papers.local_mamba import LocalMamba, Order
from tests.contracts.registered import randomised


@pytest.mark.parametrize("name, wanted", [
    ("h", [1, 2, 3, 4, 5, 6]),
    ("h_flip", [6, 5, 4, 3, 2, 1]),
    ("v", [1, 4, 2, 5, 3, 6]),
    ("v_flip", [6, 3, 5, 2, 4, 1]),
    ("w2", [1, 2, 4, 5, 3, 0, 6, 0]),
    ("w2_flip", [0, 6, 0, 3, 5, 4, 2, 1]),
])
def test_orders(name, wanted):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 2, 3, 1)
    assert Order(name).line(x).flatten().tolist() == wanted


@pytest.mark.parametrize("name", ["h", "v", "w2", "w7", "h_flip", "v_flip", "w3_flip"])
@pytest.mark.parametrize("grid", [(5,), (4, 4), (5, 3), (2, 3, 4)])
def test_the_way_back(name, grid):
    x = torch.randn(2, *grid, 3)
    torch.testing.assert_close(Order(name).back(Order(name).line(x), grid), x)


def test_prefix_tokens_are_seen_and_see():
    mixer = randomised(LocalMamba(Site(16, grid=(4, 6)))).double()
    x, prefix = (torch.randn(1, *shape, 16, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2,)))
    out, out_prefix = mixer(x, prefix=prefix)
    assert out.shape == x.shape and out_prefix.shape == prefix.shape
    seen, = torch.autograd.grad(out.sum(), prefix, retain_graph=True)
    sees, = torch.autograd.grad(out_prefix.sum(), x)
    assert (seen.abs().amax(-1) > 0).all() and (sees.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ["", "w", "w0", "x2", "h_flop"])
def test_an_order_that_is_not_known(name):
    with pytest.raises(SaccadeError, match="no order"):
        LocalMamba(Site(16), [name])
