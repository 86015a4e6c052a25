"""The pointing game, and what corruptions do to pixels."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError, list_explainers
from saccade.papers.explainable_robust import CORRUPTIONS, NINE, corrupt, pointing_game


def picture(side=32):
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def test_nine_methods_that_explain_knows():
    assert len(set(NINE)) == 9 and set(NINE) <= set(list_explainers())


def test_pointing_game():
    where = torch.zeros(4, 5, 6, dtype=torch.bool)
    where[:, 1:3, 2:4] = True
    maps = torch.zeros(4, 5, 6)
    maps[0, 2, 3], maps[1, 4, 5] = 1, 1
    maps[2, 1, 2] = maps[2, 0, 5] = 1  # of equal ones the first
    assert pointing_game(maps, where).tolist() == [True, False, False, False]
    assert pointing_game(-maps - where.float(), where).tolist() == [False] * 4
    with pytest.raises(SaccadeError, match=r"\(4, 5, 6\).*\(5, 6\)"):
        pointing_game(maps, where[0])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_grows_with_its_strength_and_is_the_same_each_time(name):
    pytest.importorskip("torchvision")
    x = picture(64)
    found = [corrupt(x, name, strength) for strength in (1, 3, 5)]
    assert all(one.shape == x.shape and one.min() >= 0 and one.max() <= 1 for one in found)
    far = [float((one - x).square().mean()) for one in found]
    assert 0 < far[0] < far[1] < far[2]
    assert torch.equal(found[1], corrupt(x, name, 3))


def test_what_a_corruption_keeps():
    x = 0.25 + 0.5 * picture()
    assert_close(corrupt(x, "contrast").mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert_close(corrupt(x, "contrast").std((1, 2, 3)), 0.2 * x.std((1, 2, 3)))
    assert_close(corrupt(x / 2, "brightness"), x / 2 + 0.3)
    flat = torch.full((1, 3, 64, 64), 0.5)
    for name in ("blur", "pixelate"):
        assert_close(corrupt(flat, name), flat)
    assert float(corrupt(flat, "noise").std()) == pytest.approx(0.18, rel=0.05)
    assert float(corrupt(flat, "shot").std()) == pytest.approx((0.5 / 12) ** 0.5, rel=0.05)
    assert float((corrupt(flat, "impulse") != 0.5).float().mean()) == pytest.approx(0.09, rel=0.1)
    blurred = corrupt(torch.eye(64).expand(1, 3, 64, 64), "blur", 5)
    assert float(blurred[0, 0, 32, 32]) == pytest.approx(1 / (2 * (6 * 64 / 224) * torch.pi**0.5), rel=0.05)


def test_errors():
    with pytest.raises(SaccadeError, match="no corruption 'nose'; did you mean noise"):
        corrupt(picture(), "nose")
    with pytest.raises(SaccadeError, match="strength is 6: give 1 to 5"):
        corrupt(picture(), "noise", 6)
