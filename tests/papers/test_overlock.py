"""What OverLoCK's goldens do not show: the sum in loops, merged branches, the auxiliary head, its use elsewhere."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import create_model
from saccade.ops.neighborhood_sum import neighborhood_bias, neighborhood_sum
from saccade.ops.reference import neighbours
from saccade.parts.contmix import ContMix
from saccade.parts.reparameterize import reparameterize


@pytest.mark.parametrize("grid", [(9,), (5, 8), (3, 5, 4)])
def test_sum_and_bias_in_loops(grid):
    kernel, heads = 3, 2
    weights = torch.randn(2, heads, *grid, kernel ** len(grid), dtype=torch.float64)
    values = torch.randn(2, *grid, heads, 4, dtype=torch.float64)
    bias = torch.randn(heads, *[2 * kernel - 1] * len(grid), dtype=torch.float64)
    out, biases = neighborhood_sum(weights, values, kernel), neighborhood_bias(bias, grid, kernel)
    for i in product(*map(range, grid)):
        near = list(product(*(neighbours(place, size, kernel, 1) for place, size in zip(i, grid))))
        for head in range(heads):
            wanted = sum(weights[(slice(None), head, *i, n)][:, None] * values[(slice(None), *j, head)]
                         for n, j in enumerate(near))
            torch.testing.assert_close(out[(slice(None), *i, head)], wanted)
            assert biases[(head, *i)].tolist() == [
                float(bias[(head, *(b - a + kernel - 1 for a, b in zip(i, j)))]) for j in near]


def test_deployed_equals_and_counts_the_published_parameters():
    model, image = create_model("overlock_nano", num_classes=3).double().eval(), torch.randn(1, 3, 37, 45).double()
    with torch.no_grad():
        torch.testing.assert_close(reparameterize(model)(image), model(image))
    for name, million in (("overlock_xt", 16.45), ("overlock_t", 33.47)):
        large = reparameterize(create_model(name).eval())
        count = sum(p.numel() for key, p in large.named_parameters() if not key.startswith("head_auxiliary"))
        assert count / 1e6 == pytest.approx(million, rel=0.01)


def test_the_auxiliary_head_learns():
    model, image = create_model("overlock_nano", num_classes=3).train(), torch.randn(2, 3, 32, 32)
    scores = model.forward_auxiliary(image)
    assert {key: tuple(value.shape) for key, value in scores.items()} == {"out": (2, 3), "auxiliary": (2, 3)}
    sum(value.square().sum() for value in scores.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.head_auxiliary.parameters())


def test_contmix_by_name_has_no_guide_and_runs_in_the_focus_net():
    model = create_model("overlock_nano", num_classes=3, mixer="contmix").eval()
    assert {mixer.context for mixer in model.modules() if isinstance(mixer, ContMix)} == {None}
    with torch.no_grad():
        assert model(torch.randn(1, 3, 37, 29)).isfinite().all()
