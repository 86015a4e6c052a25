"""Scores of trust: a known map of a known function gets the number that follows from it."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from saccade import SaccadeError, explain
from saccade.attribution.trust import deletion, insertion, rank_correlation, shuffled
from tests.attribution.planted import pictures, trained


class Share(torch.nn.Module):
    """p(class 1) is the share of pixels of the left half that are 1."""

    def forward(self, image):
        share = image[:, 0, :, : image.shape[3] // 2].mean((1, 2)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([(1 - share).log(), share.log()], 1)


IMAGE = torch.ones(1, 1, 8, 8)
LEFT = (torch.arange(8) < 4).float().expand(1, 8, 8)


def test_deletion_of_the_half_that_counts_first_and_last():
    target = torch.tensor([1])
    assert deletion(Share(), IMAGE, LEFT, target, steps=64).item() == pytest.approx(0.25, abs=1e-3)
    assert deletion(Share(), IMAGE, -LEFT, target, steps=64).item() == pytest.approx(0.75, abs=1e-3)
    both = deletion(Share(), IMAGE.expand(2, -1, -1, -1), torch.cat([LEFT, -LEFT]), torch.tensor([1, 1]), steps=64)
    assert both.tolist() == pytest.approx([0.25, 0.75], abs=1e-3)
    assert deletion(Share(), IMAGE, LEFT, torch.tensor([0]), steps=64).item() == pytest.approx(0.75, abs=1e-3)


def test_insertion_ends_at_the_picture_and_rewards_the_planted_patch():
    model = trained("cnn")
    image, label, where = pictures(8, seed=0)
    good, bad = where.float(), 1 - where.float()
    assert (insertion(model, image, good, label) > insertion(model, image, bad, label)).float().mean() > 0.8
    assert (deletion(model, image, good, label) < deletion(model, image, bad, label)).float().mean() > 0.8


def test_rank_correlation_is_spearmans():
    one, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    one[0], other[1] = one[0].round(), other[1].relu()  # ties
    wanted = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(one, other, strict=True)]
    assert rank_correlation(one, other).tolist() == pytest.approx(wanted)
    assert rank_correlation(one, one.exp()).tolist() == pytest.approx([1, 1])
    assert rank_correlation(torch.zeros(1, 5, 7), other[:1]).isnan().all()


def test_a_shuffled_model_has_the_same_weights_in_another_order_and_other_maps():
    model = trained("cnn")
    other = shuffled(model)
    for name, value in model.state_dict().items():
        mixed = other.state_dict()[name]
        torch.testing.assert_close(mixed.flatten().sort().values, value.flatten().sort().values)
    assert not torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(shuffled(model)[0].weight, other[0].weight)
    image, label, _ = pictures(16, seed=0)
    maps, mixed = (explain(each, image, "integrated_gradients", label).maps for each in (model, other))
    assert rank_correlation(maps, mixed).mean().abs() < 0.3  # signs come from what was learned
    assert rank_correlation(maps.abs(), mixed.abs()).mean() > 0.3  # sizes alone from the picture: the check's point


def test_errors():
    with pytest.raises(SaccadeError, match="steps is 0"):
        deletion(Share(), IMAGE, LEFT, torch.tensor([1]), steps=0)
    with pytest.raises(SaccadeError, match=r"do not fit.*\(B, H, W\)"):
        insertion(Share(), IMAGE, LEFT[0], torch.tensor([1]))
    with pytest.raises(SaccadeError, match="cannot be compared"):
        rank_correlation(LEFT, LEFT[:, :2])
