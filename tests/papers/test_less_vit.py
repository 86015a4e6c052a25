"""What goldens of LESS attention do not show: one attention to all pairs, the perception field, bad numbers."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site
from saccade.papers.less_vit import LessAttention, LowRankAttention, perception_field
from tests.contracts.registered import randomised


def test_one_rank_is_attention_among_all_pairs_with_the_product_of_weights():
    layer = randomised(LowRankAttention(8, 1, 2, 4)).double()
    layer.proj = torch.nn.Identity()
    bands, places = torch.randn(1, 3, 2, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)

    def weights_and_values(branch, x):
        q, k = branch.qk(x).chunk(2, -1)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[0], branch.v(x)[0]

    with torch.no_grad():
        (A, V), (B, W) = (weights_and_values(branch, x) for branch, x in
                          ((layer.channel_branch, bands), (layer.spatial_branch, places)))
        wanted = torch.kron(A, B) @ torch.kron(V, W)
        torch.testing.assert_close(layer(bands, places)[0].flatten(0, 1), wanted)


def test_perception_field_in_loops():
    mask = perception_field((4, 5), 2.5, torch.float32, torch.device("cpu"))
    for i in range(20):
        for j in range(20):
            near = (i // 5 - j // 5) ** 2 + (i % 5 - j % 5) ** 2 <= 2.5**2
            assert float(mask[i, j]) == (0 if near else -torch.inf)


def test_a_field_as_wide_as_the_grid_is_none():
    mixer = randomised(LessAttention(Site(16, 2, grid=(3, 4, 4)))).eval()
    x = torch.randn(2, 3, 4, 4, 16)
    with torch.no_grad():
        free = mixer(x)
        mixer.field = 9.0
        torch.testing.assert_close(mixer(x), free)
        mixer.field = 1.0
        assert (mixer(x) - free).abs().max() > 1e-3


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="product is 2 x 8"):
        LowRankAttention(8, 2, 4, 8)
    with pytest.raises(SaccadeError, match="head_bands=3"):
        LessAttention(Site(16, 2), head_bands=3)
