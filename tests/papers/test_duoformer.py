"""What DuoFormer's goldens do not show: which tokens a place has, padding, maps, bad numbers."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.duoformer import DuoFormer, padding_mask, places_of
from tests.contracts.registered import randomised


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_place_has_the_tokens_above_it(side):
    rows, columns = 3, 2
    x = torch.arange(rows * side * columns * side, dtype=torch.float32).view(1, rows * side, columns * side, 1)
    found = places_of(x, side).squeeze(-1)
    for row in range(rows):
        for column in range(columns):
            block = x[0, row * side:(row + 1) * side, column * side:(column + 1) * side, 0]
            wanted = block.T if side == 2 else block
            assert found[row * columns + column].tolist() == wanted.flatten().tolist()


def test_padding_is_masked_and_nothing_else():
    mask = padding_mask(((2, 1), (3, 2), (5, 4)), (1, 2, 4), torch.device("cpu"), torch.float32)
    assert mask.shape == (2, 1, 1, 1 + 1 + 4 + 16)
    seen = (mask == 0)[:, 0, 0]
    assert seen[0].all()
    assert seen[1].nonzero().flatten().tolist() == [0, 1, 2, 4, 6, 7, 8, 9]  # one row of each finer map is left


def test_padding_has_no_influence():
    """On an image of whole places, scale attention of a place is the same where a neighbour is cut."""
    trunk = create_model("resnet_nano", strides=(1, 2, 2))
    model = randomised(DuoFormer(trunk, 16, 2, 2, scales=3, num_classes=3, img_size=32)).double().eval()
    maps = [torch.randn(1, width, side, side, dtype=torch.float64)
            for width, side in zip(model.trunk.feature_info.channels(), (8, 4, 2))]
    model.trunk.features = lambda image: maps
    with torch.no_grad():
        whole, _ = model.places(maps[0])
        maps[0], maps[1] = maps[0][:, :, :5, :], maps[1][:, :, :3, :]
        cut, _ = model.places(maps[0])
    torch.testing.assert_close(cut[:, :2], whole[:, :2])
    assert (cut[:, 2:, 0] - whole[:, 2:, 0]).abs().max() > 1e-6


def test_maps_hold_the_tokens_where_they_were():
    model = create_model("duoformer_nano", features_only=True).eval()
    model.model.scales = torch.nn.ModuleList()
    torch.nn.init.zeros_(model.model.scale_position)
    image = torch.randn(1, 3, 41, 29)
    with torch.no_grad():
        maps, trunk = model(image), model.model.trunk.features(image)
        for ours, theirs, project in list(zip(maps, trunk, model.model.project))[:-1]:
            torch.testing.assert_close(ours, project(theirs.movedim(1, -1)).movedim(-1, 1))


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="scales=4"):
        create_model("duoformer_nano", scales=4)
    with pytest.raises(SaccadeError, match="global_pool"):
        create_model("duoformer_nano", global_pool="max")
