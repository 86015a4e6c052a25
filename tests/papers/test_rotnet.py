"""RotNet: turns, and that telling them is learnt by a network of ours."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, create_model
from saccade.papers.rotnet import RotationPrediction, rotations


def test_turns():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert [turned[0].tolist() for turned in rotations(image)[0]] == [
        [[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    with pytest.raises(SaccadeError, match="2 x 3 pixels"):
        rotations(torch.zeros(1, 3, 2, 3))


def test_any_backbone_learns_to_tell_them():
    torch.manual_seed(0)
    method = RotationPrediction(create_model("deit_nano", num_classes=0)).train()
    images = torch.rand(16, 3, 32, 32)
    images[:, :, :10] += 1.5  # a sky
    optimizer = torch.optim.Adam(method.parameters(), 2e-3)
    for _ in range(80):
        out = method(images)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["accuracy"] > 0.9
    with pytest.raises(SaccadeError, match="num_classes=0"):
        RotationPrediction(create_model("convnext_nano", num_classes=4))


def test_networks_of_the_paper():
    for stages, side in ((3, 4), (5, 8)):
        model = create_model(f"rotnet_nin{stages}", **({"pool_third": True} if stages == 3 else {})).eval()
        assert model.features(torch.zeros(1, 3, 32, 32))[f"conv{stages}"].shape == (1, 192, side, side)
    with torch.no_grad():
        assert create_model("rotnet_alexnet").eval()(torch.zeros(1, 3, 160, 200)).shape == (1, 4)
