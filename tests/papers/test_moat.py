"""What MOAT's goldens do not show: published arithmetic, windows on grids that they do not divide."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_model
from saccade.core.index import index
from saccade.papers.moat import SIZES, MoatAttention
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


@pytest.mark.parametrize("name", ["moat_0", "moat_2", "tiny_moat_0", "tiny_moat_3"])
def test_published_multiply_adds(name):
    with torch.device("meta"):
        model = create_model(name)
        image = torch.empty(1, 3, SIZES[name]["img_size"], SIZES[name]["img_size"])
    # The paper's numbers lie one to three percent above products and convolutions alone, in every size.
    assert count_macs(model, (image,)) == pytest.approx(index()["papers"]["moat"]["macs"][name], rel=0.03, abs=0.06e9)


def test_a_cut_window_is_attention_among_what_it_holds():
    site = Site(32, 2, grid=(8, 8))
    windowed = randomised(MoatAttention(site, window=(4, 3))).double().eval()
    x = torch.randn(2, 6, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        out = windowed(x)
        for rows, columns in [((0, 4), (0, 3)), ((4, 6), (3, 6)), ((4, 6), (6, 7))]:
            part = x[:, rows[0]:rows[1], columns[0]:columns[1]]
            q, k, v = windowed.qkv(part).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            places = [(row, column) for row in range(part.shape[1]) for column in range(part.shape[2])]
            bias = torch.stack([torch.stack([windowed.table[a - c + 3, b - d + 2] for c, d in places], -1)
                                for a, b in places], 1)
            weights = (q @ k.mT / 4 + bias).softmax(-1)
            wanted = windowed.proj((weights @ v).transpose(1, 2).flatten(2)).view(part.shape)
            torch.testing.assert_close(out[:, rows[0]:rows[1], columns[0]:columns[1]], wanted)


def test_without_position_there_is_no_table():
    with torch.device("meta"):
        keys = create_model("tiny_moat_0_no_pe").state_dict()
    assert not [key for key in keys if key.endswith("table")]
