"""DToP: which tokens leave, beside loops; what a threshold does; training."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError
from saccade.papers.dtop import CONTEXT, dtop, segmentation_loss
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def narrow(thresholds=(0.3, 0.3, 1.0), **options):
    torch.manual_seed(0)
    settings = dict(dim=24, depth=6, heads=2, stages=(1, 3, 5), num_classes=4, img_size=64, patch=8, head_dim=12,
                    layers=1)
    return randomised(dtop(thresholds=thresholds, **settings | options)).eval()


def test_undecided_beside_loops():
    model = narrow()
    scores = torch.rand(3, 4, 40)
    model.kept.numbers = torch.arange(40).expand(3, -1).clone()
    model.kept.numbers[1, 30:] = -1
    for picture, stays in enumerate(model.undecided(scores, 0.7)):
        score, kind = scores[picture].max(0)
        for token in range(40):
            rivals = ((kind == kind[token]) & (score > score[token]) & (model.kept.numbers[picture] >= 0)).sum()
            real = bool(model.kept.numbers[picture, token] >= 0)
            assert bool(stays[token]) == (real and (bool(score[token] <= 0.7) or int(rivals) < CONTEXT))


def test_no_threshold_is_no_pruning_and_lower_ones_prune_more():
    image = torch.randn(2, 3, 64, 64)
    macs, results = [], []
    for threshold in (1.0, 0.6, 0.4, 0.2):
        model = narrow((threshold, threshold, 1.0))
        with torch.no_grad():
            results.append(model(image))
            torch.testing.assert_close(torch.cat([model(one[None]) for one in image]), results[-1])
        macs.append(count_macs(model, (image,)))
    assert macs == sorted(macs, reverse=True) and macs[-1] < 0.9 * macs[0]
    assert results[0].shape == (2, 4, 64, 64) and not torch.equal(results[0], results[-1])


def test_masks_of_tokens_that_left_are_kept():
    model, image = narrow((0.2, 1.0, 1.0)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (first, second, third), _ = model.run(image)
    left = (third.features == 0).all(-1)[0]
    assert 0 < int(left.sum()) < 64
    assert torch.equal(second.masks[0, :, left], first.masks[0, :, left])
    assert torch.equal(third.masks[0, :, left], first.masks[0, :, left])
    assert not torch.isclose(third.masks[0, :, ~left], first.masks[0, :, ~left]).any(0).all()


def test_any_size():
    with torch.no_grad():
        assert narrow()(torch.randn(2, 3, 41, 70)).shape == (2, 4, 41, 70)


def test_it_learns_where_things_are():
    torch.manual_seed(0)
    settings = dict(dim=24, depth=4, heads=2, stages=(1, 3), num_classes=3, img_size=32, patch=8, head_dim=12, layers=1)
    model = dtop(thresholds=(0.9, 1.0), drop_path_rate=0.0, **settings).train()
    labels = torch.zeros(8, 32, 32, dtype=torch.long)
    labels[:, 8:24, 8:16], labels[::2, 24:] = 1, 2
    image = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    labels[0, :4] = 255
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = segmentation_loss(model(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        found = model.eval()(image).argmax(1)
    assert float((found == labels)[labels != 255].float().mean()) > 0.9


def test_bad_input():
    with pytest.raises(SaccadeError, match="one threshold each"):
        narrow((0.5, 1.0))
