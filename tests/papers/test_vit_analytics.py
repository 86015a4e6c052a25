"""Heads that are put out, by hand too; rings of attention in closed form; planted patterns are told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.core.record import record
from saccade.papers.vit_analytics import divergence, importance, patterns, reach
from tests.attribution.test_attention import foreign
from tests.contracts.registered import randomised

GRID = (5, 5)


@pytest.mark.parametrize("host", ["deit_nano", "swin_nano", "pvt_v2_nano", "timm", "torchvision", "transformers"])
def test_a_head_put_out_is_its_columns_of_the_projection_zeroed(host):
    torch.manual_seed(0)
    ours = host.endswith("nano")
    model = randomised(create_model(host, num_classes=5)).eval() if ours else foreign(host)
    image, target = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    found = importance(model, image, target)
    name = list(found["drop"])[-1]
    at = {"timm": "proj", "torchvision": "out_proj", "transformers": "o_proj"}.get(host, "proj")
    weight = model.get_submodule(name).get_submodule(at).weight
    heads = len(found["drop"][name])

    def chance():
        with torch.no_grad():
            given = model(image)
        return getattr(given, "logits", given).softmax(1)

    before, kept = chance(), weight.detach().clone()
    for head in range(heads):
        for metric in ("drop", "alone"):
            with torch.no_grad():
                mine = torch.arange(weight.shape[1]) // (weight.shape[1] // heads) == head
                weight.copy_(kept * ~(mine if metric == "drop" else ~mine))
            after = chance()
            rows = range(2), target
            wanted = (before[rows] - after[rows]).mean() if metric == "drop" else after[rows].mean()
            assert_close(found[metric][name][head], wanted, rtol=1e-4, atol=1e-6)
        assert 0 <= found["moved"][name][head] <= math.log(2) and 0 <= found["turned"][name][head] <= 2
    weight.data.copy_(kept)
    assert torch.equal(chance(), before)


def test_a_head_that_writes_nothing_does_not_matter():
    torch.manual_seed(0)
    model = randomised(create_model("deit_nano", num_classes=3)).eval()
    with torch.no_grad():
        model.blocks[2].mixer.proj.weight.unflatten(1, (2, -1))[:, 1] = 0
    found = importance(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    name = "blocks.2.mixer"
    assert all(found[metric][name][1].abs() < 1e-6 < found[metric][name][0].abs() for metric in ("drop", "moved"))


def test_watching_may_change_the_weights_and_only_there():
    torch.manual_seed(0)
    model, image = create_model("deit_nano", num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(image)
        with record(model, "blocks.1.*", change=lambda name, weights: weights * 0) as found:
            changed = model(image)
        assert found.keys() == ["blocks.1.mixer"] and found["blocks.1.mixer"].parts[0].weights.abs().max() == 0
        with record(model, change=lambda name, weights: weights):
            assert_close(model(image), before)
        assert torch.equal(model(image), before) and not torch.allclose(changed, before)


def test_divergence():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert_close(divergence(p, q), torch.tensor([0.0, math.log(2)]))
    p, q = torch.rand(2, 4, 6).softmax(-1)
    assert_close(divergence(p, q), divergence(q, p))


def test_rings_in_closed_form():
    tokens = 1 + GRID[0] * GRID[1]
    uniform = torch.full((tokens, tokens), 1 / tokens)
    itself, class_token = torch.eye(tokens), torch.zeros(tokens, tokens)
    class_token[:, 0] = 1
    found = reach(torch.stack([uniform, itself, class_token])[None], 1, GRID)
    assert_close(found.rings.sum(1) + found.prefix, torch.ones(3))
    assert_close(found.rings[1], torch.tensor([1.0, 0, 0, 0, 0])) and found.distance[1] == 0
    assert found.prefix[2] == 1 and found.rings[2].abs().max() == 0
    assert_close(found.even[0], torch.full((5,), 1 / tokens))
    pairs = [max(abs(a - c), abs(b - d)) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    assert_close(found.distance[0], torch.tensor(sum(pairs) / len(pairs)))
    # of a patch in the middle 8 k others stand in ring k
    alone = torch.zeros(tokens, tokens)
    alone[1 + 12] = 1 / tokens
    rings = reach(alone[None, None], 1, GRID).rings[0] * 25
    assert_close(rings, torch.tensor([1.0, 8, 16, 0, 0]) / tokens)


def test_planted_patterns_are_told_apart():
    torch.manual_seed(0)
    noise, kinds, maps = torch.rand(36, 25, 25) * 0.1, [], []
    for number, one in enumerate(noise):
        kinds.append(number % 3)
        maps.append(one + (torch.eye(25), torch.eye(25).roll(12, 1), torch.arange(25)[None] == 7)[number % 3])
    state = torch.get_rng_state()
    found = patterns(maps, groups=3, steps=150)
    assert torch.equal(state, torch.get_rng_state()) and found.plane.shape == (36, 2) and found.error < 0.5
    assert len({(kind, int(group)) for kind, group in zip(kinds, found.group, strict=True)}) == 3
    assert torch.equal(patterns(maps, groups=3, steps=150).group, found.group)


def test_errors_say_what_to_do():
    with pytest.raises(SaccadeError, match="softmax attention"):
        importance(create_model("convnext_nano", num_classes=3), torch.randn(1, 3, 32, 32), torch.tensor([0]))
    with pytest.raises(SaccadeError, match="6 groups of 2 maps"):
        patterns([torch.eye(4)] * 2)
