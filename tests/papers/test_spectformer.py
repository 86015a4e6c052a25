"""The gate is a circular convolution; weights of another grid; the two heads of the hierarchical form."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.papers.spectformer import CARD
from saccade.parts.attention import Attention
from saccade.parts.labelled_pyramid import LabelledPyramid
from saccade.tools.measure import count_macs


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 4)])
def test_gate_is_a_circular_convolution(grid):
    """out[p] = sum_d kernel[d] x[p - d], the kernel being what the gate makes of one token that is 1."""
    torch.manual_seed(0)
    gate = create_mixer("spectral_gating", Site(2, grid=grid)).double()
    unit = torch.zeros(1, *grid, 2, dtype=torch.float64)
    unit[0, 0, 0] = 1
    x = torch.randn(1, *grid, 2, dtype=torch.float64)
    with torch.no_grad():
        kernel, wanted = gate(unit)[0], torch.zeros_like(x[0])
        for (row, column), (down, right) in product(product(*map(range, grid)), repeat=2):
            wanted[row, column] += kernel[down, right] * x[0, (row - down) % grid[0], (column - right) % grid[1]]
        torch.testing.assert_close(gate(x)[0], wanted, rtol=1e-9, atol=1e-9)


def test_constant_gate_runs_alike_on_every_grid():
    """Weights that are 1 at every frequency leave any map as it is, resampled or not."""
    gate = create_mixer("spectral_gating", Site(3, grid=(8, 8))).double()
    with torch.no_grad():
        gate.filter[..., 0], gate.filter[..., 1] = 1, 0
        for grid in [(8, 8), (5, 11), (1, 7), (3, 1)]:
            x = torch.randn(2, *grid, 3, dtype=torch.float64)
            torch.testing.assert_close(gate(x), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    """The plain table to its rounding; the hierarchical models cost 4 to 6 % more than published."""
    with torch.device("meta"):
        model = create_model(name)
    counted = count_macs(model, (torch.zeros(1, 3, 224, 224),))
    assert counted == pytest.approx(CARD.macs[name], rel=0.03 if "_h_" not in name else 0.06)


def test_where_gates_stand():
    plain = create_model("spectformer_nano")
    assert [type(block.mixer).__name__ for block in plain.blocks] == ["SpectralGating"] * 2 + ["Attention"] * 2
    assert [type(block).__name__ for block in plain.blocks] == ["SpectralBlock"] * 2 + ["TokenBlock"] * 2
    pyramid = create_model("spectformer_h_nano")
    assert isinstance(pyramid, LabelledPyramid) and isinstance(pyramid.stages[1].blocks[0].mixer, Attention)


def test_scores_are_the_class_token_s_and_half_the_best_label_s():
    torch.manual_seed(0)
    model, image = create_model("spectformer_h_nano", num_classes=5).eval(), torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        tokens = model.forward_features(image)
        scores, labels = model.label_scores(tokens)
        assert tokens.shape == (2, 1 + 5 * 3, 128) and labels.shape == (2, 15, 5)
        torch.testing.assert_close(model(image), scores + labels.max(1).values / 2)
        model.reset_classifier(4, "avg")
        torch.testing.assert_close(model(image), model.head(tokens[:, 1:].mean(1)))
        with pytest.raises(SaccadeError, match="labels the tokens"):
            model.label_scores(tokens)
        model.reset_classifier(0, "token")
        torch.testing.assert_close(model(image), tokens[:, 0])


def test_what_makes_no_sense_is_one_line():
    for options, said in [(dict(global_pool="first"), "choose one of"), (dict(patch=3), "stride is even")]:
        with pytest.raises(SaccadeError, match=said):
            create_model("spectformer_h_nano", **options)
