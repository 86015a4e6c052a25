"""Filters: every start has the moments of its formula, banks are what they are called, shapes see what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade import SaccadeError
from saccade.papers.survey_filters import (
    FIRST_LAYERS,
    INITIALISERS,
    SHAPES,
    WIDTHS,
    FilterNet,
    cosine_filters,
    gabor_filters,
    initialise,
    kmeans_filters,
    lsuv,
    patches,
    principal_filters,
)

OUT, IN, K = 96, 64, 3
FAN_IN, FAN_OUT = IN * K * K, OUT * K * K


def started(name, *shape):
    torch.manual_seed(0)
    weight = torch.empty(shape or (OUT, IN, K, K))
    with torch.no_grad():
        INITIALISERS[name](weight)
    return weight


def pictures(count=8, side=16):
    coarse = torch.randn(count, 1, side // 2, side // 2, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(("name", "variance"), [
    ("he", 2 / FAN_IN), ("lecun", 1 / FAN_IN), ("glorot", 2 / (FAN_IN + FAN_OUT)), ("small_normal", 1e-4),
    ("sparse", 2 / FAN_IN), ("orthogonal", 2 / FAN_IN), ("delta_orthogonal", 2 / FAN_IN * IN / OUT),
])
def test_variance_of_a_start(name, variance):
    weight = started(name)
    assert abs(float(weight.mean())) < 3 * (variance / weight.numel()) ** 0.5
    assert float(weight.square().mean()) == pytest.approx(variance, rel=0.1)


def test_structure_of_a_start():
    rows = started("orthogonal").flatten(1)
    assert_close(rows @ rows.T, 2 * torch.eye(OUT), rtol=0, atol=1e-4)
    assert (started("sparse").flatten(1) != 0).sum(1).tolist() == [15] * OUT
    assert (started("sparse", 5, 1, 3, 3).flatten(1) != 0).sum(1).tolist() == [9] * 5
    x = torch.randn(2, IN, 7, 7)
    assert_close(F.conv2d(x, started("dirac", IN, IN, K, K), padding=1), x)
    around = F.pad(x, (1,) * 4, mode="circular")
    turned = F.conv2d(around, started("delta_orthogonal"))
    assert_close(turned.square().sum(1), 2 * x.square().sum(1), rtol=1e-4, atol=1e-4)


def test_a_start_after_he_carries_twenty_layers_and_lecuns_fades():
    def carried(name):
        torch.manual_seed(0)
        net = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(256, 256, bias=False), nn.ReLU())])
        with torch.no_grad():
            for layer in net[::2]:
                INITIALISERS[name](layer.weight[:, :, None, None])
            x = torch.randn(64, 256)
            return float(net(x).square().mean() / x.square().mean())

    assert 0.25 < carried("he") < 4  # within two of one
    assert carried("lecun") * 2**20 == pytest.approx(carried("he"), rel=1)


def test_lsuv_gives_every_convolution_one_deviation():
    torch.manual_seed(0)
    model, x = FilterNet(10, depth=2, norm=False), 5 + 3 * torch.randn(64, 1, 8, 8)
    lsuv(model, x)
    seen = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().std())))
    model(x)
    assert len(seen) == 6 and all(0.9 < one < 1.1 for one in seen)
    rows = convolutions[-1].weight.detach().flatten(1)
    assert_close(rows @ rows.T / rows[0].square().sum(), torch.eye(len(rows)), rtol=0, atol=1e-4)


def test_principal_filters_are_orthonormal_and_sorted():
    rows = patches(pictures(), 3)
    assert_close(rows.mean(1), torch.zeros(len(rows)), rtol=0, atol=1e-6)
    bank = principal_filters(rows, 8)
    assert_close(bank @ bank.T, torch.eye(8), rtol=0, atol=1e-4)
    spread = (rows @ bank.T).square().mean(0)
    assert (spread[1:] <= spread[:-1] * (1 + 1e-5)).all()
    assert float(spread.sum()) == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-4)  # the constant has none
    assert_close(principal_filters(rows, 20)[8:16], -bank)


def test_kmeans_filters_are_of_length_one_and_no_twins():
    pytest.importorskip("sklearn")
    bank = kmeans_filters(patches(pictures(), 3), 8)
    assert_close(bank.norm(dim=1), torch.ones(8))
    assert float((bank @ bank.T - torch.eye(8)).amax()) < 0.95
    assert torch.equal(bank, kmeans_filters(patches(pictures(), 3), 8))


def test_gabor_and_cosine_banks():
    bank = gabor_filters(16, 7)
    assert_close(bank.sum((1, 2)), torch.zeros(16), rtol=0, atol=1e-5)
    assert_close(bank.square().sum((1, 2)), torch.ones(16))
    assert_close(bank[:8].flip(1, 2), bank[:8], rtol=0, atol=1e-6)  # even
    assert_close(bank[8:].flip(1, 2), -bank[8:], rtol=0, atol=1e-6)  # odd
    assert_close(bank[4], bank[0].T, rtol=0, atol=1e-6)  # a quarter turn
    waves = cosine_filters(4).flatten(1)
    assert_close(waves @ waves.T, torch.eye(16), rtol=0, atol=1e-6)
    assert_close(waves[0], torch.full((16,), 0.25))


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_a_bank_fits_a_first_layer(name):
    x = pictures().expand(-1, 3, -1, -1)
    for size in (3, 5):
        bank = FIRST_LAYERS[name](x, 20, size)
        assert bank.shape == (20, 3, size, size) and bank.isfinite().all()
        assert (bank.flatten(1).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(("shape", "reach"), [
    ("1x1", 1), ("3x3", 3), ("5x5", 5), ("7x7", 7), ("3x3 twice", 5), ("1x5, 5x1", 5), ("3x3 dilated", 5),
    ("5x5 depthwise, 1x1", 5),
])
def test_shapes_see_what_they_say(shape, reach):
    assert shape in SHAPES
    torch.manual_seed(0)
    layer, x = SHAPES[shape](6, 8), torch.randn(1, 6, 11, 11, requires_grad=True)
    assert layer(x).shape == (1, 8, 11, 11)
    layer(x)[0, :, 5, 5].sum().backward()
    seen = torch.nonzero(x.grad.abs().sum((0, 1)))
    assert (seen.amax(0) - seen.amin(0) + 1).amax() == reach
    weights = {"1x1": 6 * 8, "3x3": 9 * 6 * 8, "5x5": 25 * 6 * 8, "7x7": 49 * 6 * 8, "3x3 twice": 9 * 8 * (6 + 8),
               "1x5, 5x1": 5 * 8 * (6 + 8), "3x3 dilated": 9 * 6 * 8, "5x5 depthwise, 1x1": 25 * 6 + 6 * 8}
    assert sum(p.numel() for p in layer.parameters() if p.ndim > 1) == weights[shape]


def test_widths_of_one_table_cost_alike():
    counts = {name: sum(p.numel() for p in FilterNet(10, width=name).parameters()) for name in WIDTHS}
    for name in ("equal", "pyramidal", "halved"):
        assert counts[name] == pytest.approx(counts["doubled"], rel=0.15)


def test_errors():
    with pytest.raises(SaccadeError, match="no initialiser 'hee'.*he, glorot"):
        initialise(FilterNet(2), "hee")
    with pytest.raises(SaccadeError, match="no '9x9'.*3x3"):
        FilterNet(2, shape="9x9")
    assert FilterNet(2)(torch.zeros(1, 1, 8, 8)).isfinite().all()
