"""CrossFormer against its rule of groups token by token, its layout and the paper's multiply-adds."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.papers.crossformer import CARD, CooledBlock, LongShortDistance
from saccade.tools.measure import declared_macs


@pytest.mark.parametrize("grid", [(7, 5), (1, 4), (9,), (3, 2, 5)])
@pytest.mark.parametrize("interval", [1, 2])
def test_each_token_meets_its_group(grid, interval):
    """Token i meets j where, on every axis, they are of one residue and one span of group x interval tokens."""
    torch.manual_seed(0)
    group = 2
    mixer = LongShortDistance(Site(32, 1, grid=(99,) * len(grid)), group, interval, long=True).double().eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, *grid, 32, dtype=torch.float64)
    places = [tuple(place) for place in torch.ones(grid).nonzero().tolist()]
    with torch.no_grad():
        found = mixer(x)
        q, k, v = mixer.qkv(x).chunk(3, -1)
        for i in places:
            met = [j for j in places if all(a % interval == b % interval and a // (group * interval) ==
                                            b // (group * interval) for a, b in zip(i, j, strict=True))]
            logits = []
            for j in met:
                offset = [(a - b) / interval for a, b in zip(i, j, strict=True)]
                bias = mixer.bias.mlp(torch.tensor(offset, dtype=torch.float64))
                logits.append(q[(0, *i)] @ k[(0, *j)] / 32**0.5 + bias[0])
            weights = torch.stack(logits).softmax(0)
            wanted = sum(weight * v[(0, *j)] for weight, j in zip(weights, met, strict=True))
            torch.testing.assert_close(found[(0, *i)], mixer.proj(wanted), rtol=1e-9, atol=1e-9)


def test_long_and_short_take_turns_and_every_third_block_cools():
    with torch.device("meta"):
        model = create_model("crossformer_pp_huge")
    blocks = list(model.stages[0].blocks)
    assert [block.mixer.interval for block in blocks] == [1, 4, 1, 4, 1, 4]
    assert [isinstance(block, CooledBlock) for block in blocks] == [False, False, True, False, False, False]
    assert {block.mixer.group for block in model.stages[2].blocks} == {(14, 14)}


# The paper's table gives CrossFormer++-S the 4.9 G of CrossFormer-S; its settings and its 23.3 M parameters make 4.4 G.
@pytest.mark.parametrize("name", sorted(CARD.macs.keys() - {"crossformer_pp_small"}))
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model = create_model(name)
        macs = declared_macs(model, (torch.empty(1, 3, 224, 224),))
    assert macs == pytest.approx(CARD.macs[name], rel=0.01, abs=0.05e9)
