"""Outlook attention from its definition; its weights on the picture; the network's shape, costs and messages."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model, record
from saccade.papers.volo import CARD, SIZES
from saccade.tools.measure import count_macs


@pytest.mark.parametrize("grid, kernel, stride", [((5, 7), 3, 2), ((4, 6), 3, 1), ((7, 4), 5, 2), ((6, 5), 3, 3),
                                                  ((7,), 3, 2), ((3, 4, 2), 3, 2)])
def test_outlook_from_its_definition(grid, kernel, stride):
    torch.manual_seed(0)
    mixer = create_mixer("outlook", Site(4, 2, grid=grid), kernel=kernel, stride=stride).double()
    x = torch.randn(1, *grid, 4, dtype=torch.float64)
    around = list(product(range(-(kernel // 2), kernel // 2 + 1), repeat=len(grid)))
    with torch.no_grad():
        v, summed = mixer.v(x)[0], torch.zeros(*grid, 4, dtype=torch.float64)
        for centre in product(*(range(0, side, stride) for side in grid)):
            cell = x[0][tuple(slice(place, place + stride) for place in centre)].flatten(0, -2)
            weights = (mixer.logits(cell.mean(0)).view(2, len(around), -1) / 2**0.5).softmax(-1)
            tokens = [tuple(c + step for c, step in zip(centre, steps)) for steps in around]
            inside = [all(0 <= t < side for t, side in zip(token, grid)) for token in tokens]
            for (a, query), (b, key) in product(enumerate(tokens), repeat=2):
                if inside[a] and inside[b]:
                    summed[query] += weights[:, a, b].repeat_interleave(2) * v[key]
        torch.testing.assert_close(mixer(x)[0], mixer.proj(summed), rtol=1e-9, atol=1e-9)


def test_recorded_weights_are_what_was_summed():
    torch.manual_seed(0)
    mixer = create_mixer("outlook", Site(8, 2, grid=(5, 6))).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    model = torch.nn.Sequential(mixer)
    with torch.no_grad(), record(model) as r:
        out = model(x)
        values = mixer.v(x).flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
        summed = (r["0"].dense(batch=2) @ values).transpose(1, 2).reshape(2, 5, 6, 8)
        torch.testing.assert_close(out, mixer.proj(summed), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CARD.macs)
def test_published_multiply_adds(name):
    """Those of volo_d5, whose stem is twice as wide, are 3 to 5 % more than published."""
    side = SIZES[name].get("img_size", 224)
    with torch.device("meta"):
        model = create_model(name)
    assert count_macs(model, (torch.zeros(1, 3, side, side),)) == pytest.approx(CARD.macs[name], rel=0.05)


def test_outlookers_know_no_drop_path_and_the_rest_is_left_out():
    model = create_model("volo_nano", drop_path_rate=0.3)
    assert isinstance(model.stages[0].blocks[0].scale1, torch.nn.Identity)
    assert model.stages[2].blocks[1].scale1[0].rate == pytest.approx(0.3)
    maps = create_model("volo_nano", features_only=True)(torch.randn(1, 3, 42, 31))
    assert [tuple(one.shape[2:]) for one in maps] == [(10, 8), (5, 4), (5, 4)]


def test_what_makes_no_sense_is_one_line():
    for options, said in [(dict(kernel=4), "odd side"), (dict(patch=5), "stride is even"),
                          (dict(global_pool="first"), "choose one of")]:
        with pytest.raises(SaccadeError, match=said):
            create_model("volo_nano", **options)
