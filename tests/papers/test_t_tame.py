"""T-TAME learns small maps that keep the class while its classifier stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from saccade import SaccadeError, create_model
from saccade.papers.t_tame import Tame, t_tame, token_map
from tests.attribution.planted import auc, pictures, trained


def test_small_maps_keep_the_class_and_lie_where_it_is_decided():
    body = trained("swin_nano")
    torch.manual_seed(0)
    model = Tame(body, (0,), num_classes=2)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    optimizer = torch.optim.AdamW(model.attention.parameters(), lr=2e-3)
    model.train()
    for step in range(80):
        image, label, _ = pictures(32, seed=5000 + step)
        optimizer.zero_grad()
        model.loss(image, label, area=0.3).backward()
        optimizer.step()
    model.eval()
    image, label, where = pictures(50, seed=0)
    maps = t_tame(model, image, label)
    assert maps.mean() < 0.2
    assert auc(maps, where) > 0.6  # a blind map has 0.5
    assert (body(image * maps[:, None]).argmax(1) == label).float().mean() > 0.9
    assert_close(model(image), body(image))
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


def test_tokens_are_multiplied_by_the_class_token():
    tokens = torch.arange(14.0).view(1, 7, 2)
    found = token_map(tokens, (2, 3))
    assert found.shape == (1, 2, 2, 3) and found[0, 1, 1, 2] == 13 * 1 and found[0, 0].sum() == 0


def test_any_grid_and_clear_errors():
    model = Tame(create_model("deit_nano", num_classes=3), (3, 5), num_classes=3).eval()
    assert t_tame(model, torch.randn(2, 3, 36, 20), torch.tensor([0, 2])).shape == (2, 36, 20)
    with pytest.raises(SaccadeError, match="0 to 5"):
        Tame(create_model("deit_nano"), (6,))
    with pytest.raises(SaccadeError, match="train one"):
        t_tame(torch.nn.Identity(), torch.randn(1, 3, 8, 8), torch.tensor([0]))
