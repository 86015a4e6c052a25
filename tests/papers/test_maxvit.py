"""What MaxViT's goldens do not show: published arithmetic at other sizes, and which windows are built."""

from __future__ import annotations

import pytest
import torch

from saccade import create_model
from saccade.core.index import index
from saccade.papers.maxvit import SIZES, gather, spread
from saccade.tools.measure import count_macs


@pytest.mark.parametrize("name", ["maxvit_small_tf", "maxvit_base_tf", "maxvit_tiny_tf_384"])
def test_published_multiply_adds(name):
    side = SIZES[name].get("img_size", 224)
    with torch.device("meta"):
        model = create_model(name)
        image = torch.empty(1, 3, side, side)
    assert count_macs(model, (image,)) == pytest.approx(index()["papers"]["maxvit"]["macs"][name], rel=0.05)


@pytest.mark.parametrize("size, window", [(224, (7, 7)), ((224, 448), (7, 7)), (256, (8, 8)), (384, (12, 12))])
def test_windows_follow_the_native_grid(size, window):
    with torch.device("meta"):
        model = create_model("maxvit_tiny_tf", img_size=size)
    assert {block.mixer.window for stage in model.stages for block in stage.blocks} == {window}


def test_a_group_of_the_grid_lies_a_step_apart():
    x = torch.arange(48.0).view(1, 6, 8, 1)
    groups = spread(x, (3, 2))
    assert groups.shape == (8, 6, 1)
    assert groups[0, :, 0].tolist() == [0, 4, 16, 20, 32, 36]
    assert torch.equal(gather(groups, (3, 2), (6, 8)), x)
