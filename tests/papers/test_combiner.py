"""Combiner: a full attention matrix whose rows sum to one, at less than quadratic cost; causal forms; bad input."""

from __future__ import annotations

from math import log

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, record
from saccade.papers.combiner import CombinerAxial, CombinerFixed


def made(kind, grid, **options):
    torch.manual_seed(0)
    return kind(Site(16, 2, grid=grid), **options).double().eval()


def matrix(mixer, x):
    model = torch.nn.Sequential(mixer)
    with record(model) as r:
        model(x)
    return r["0"].dense(batch=len(x))


CASES = [(CombinerFixed, (7,)), (CombinerFixed, (16,)), (CombinerFixed, (1,)), (CombinerFixed, (3, 5)),
         (CombinerFixed, (2, 3, 4)), (CombinerAxial, (3, 5)), (CombinerAxial, (1, 6)), (CombinerAxial, (2, 3, 4))]


@pytest.mark.parametrize("kind, grid", CASES)
def test_every_token_has_a_full_distribution(kind, grid):
    """All weights positive, rows sum to one, and the output is that matrix times the values."""
    mixer, x = made(kind, grid), torch.randn(2, *grid, 16, dtype=torch.float64)
    dense = matrix(mixer, x)
    tokens = x[0, ..., 0].numel()
    assert dense.shape == (2, 2, tokens, tokens) and dense.min() > 0
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
    v = mixer.qkv(x).flatten(1, -2)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(mixer(x), mixer.proj((dense @ v).transpose(1, 2).reshape(x.shape)))


@pytest.mark.parametrize("grid", [(7,), (9,), (3, 4)])
def test_causal_rows_are_distributions_over_the_past(grid):
    mixer, x = made(CombinerFixed, grid, causal=True), torch.randn(1, *grid, 16, dtype=torch.float64)
    dense = matrix(mixer, x)
    past = torch.ones_like(dense[0, 0]).tril() > 0
    assert (dense[..., past] > 0).all() and (dense[..., ~past] == 0).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))


def test_one_row_is_full_causal_attention():
    mixer, x = made(CombinerFixed, (6,), row=6, causal=True), torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(matrix(mixer, x), logits.softmax(-1))


@pytest.mark.parametrize("name", ["combiner_fixed", "combiner_axial"])
def test_cost_grows_as_n_sqrt_n(name):
    """Counted without the layers on tokens: four times the tokens are eight times the products, not sixteen."""
    mixer = create_mixer(name, Site(16, 2, grid=(64, 64)))
    site, layers = Site(16, 2), sum(layer.weight.numel() for layer in mixer.modules() if hasattr(layer, "out_features"))
    costs = [mixer.cost(site, (side, side)) - side * side * layers for side in (64, 128)]
    assert log(costs[1] / costs[0]) / log(4) == pytest.approx(1.5, abs=0.02)


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="rows and columns"):
        CombinerAxial(Site(16, 2, grid=(9,)))
    with pytest.raises(SaccadeError, match="row=0"):
        CombinerFixed(Site(16, 2, grid=(9,)), row=0)
