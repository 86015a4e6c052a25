"""Gaussian adaptive attention: sharp densities, few tokens, the importance factor."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, record
from saccade.papers.gaam import GaussianAdaptive, importance


@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_the_weights_of_every_piece_sum_to_one(axis):
    model, x = torch.nn.Sequential(GaussianAdaptive(Site(7, 3), axis=axis)), torch.randn(2, 10, 7)
    with torch.no_grad(), record(model) as r:
        model[0].width.fill_(2.0)
        model(x)
    weights = r["0"].parts[0].weights[:, :, 0]  # (B, C, N)
    lengths, along = ([3, 3, 4], 2) if axis == "tokens" else ([2, 2, 3], 1)
    for piece in weights.split(lengths, along):
        torch.testing.assert_close(piece.sum(along), torch.ones_like(piece.sum(along)))


def test_importance_is_of_the_recorded_weights():
    model, x = torch.nn.Sequential(GaussianAdaptive(Site(4, 1), gaussians=1)), torch.randn(3, 5, 4)
    with torch.no_grad(), record(model) as r:
        model[0].width.fill_(0.7)
        out = model(x)
    (factor,) = importance(r["0"])
    mean = (out / x).mean(0)
    assert factor.shape == (5, 4) and factor.min() == 0 and factor.max() == 1
    torch.testing.assert_close(factor, (mean - mean.min()) / (mean.max() - mean.min()), rtol=1e-4, atol=1e-5)


def test_densities_too_sharp_for_a_product_keep_their_gradient():
    """exp underflows in the product of five densities of width 0.02; its logarithm does not."""
    mixer = GaussianAdaptive(Site(1, 1), gaussians=5)
    with torch.no_grad():
        mixer.width.fill_(0.02)
    x = torch.randn(1, 9, 1, requires_grad=True)
    out = mixer(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and mixer.width.grad.isfinite().all()


@pytest.mark.parametrize("grid", [(1,), (2,), (1, 1)])
def test_fewer_tokens_than_heads(grid):
    mixer, x = GaussianAdaptive(Site(8, 4)), torch.randn(2, *grid, 8)
    assert mixer(x).shape == x.shape and mixer(x).isfinite().all()


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="tokens, channels"):
        GaussianAdaptive(Site(8, 2), axis="rows")
    with pytest.raises(SaccadeError, match="9 heads share 8 channels"):
        GaussianAdaptive(Site(8, 9), axis="channels")
