"""What NiNformer's goldens do not show: the gate in loops, other grids, the watcher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import Site, create_model, load, record
from saccade.papers.ninformer import MixerGating, TokenMlp
from tests.contracts.registered import randomised


def test_tokens_mix_a_channel_at_a_time():
    mlp = randomised(TokenMlp((2, 3), 5)).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        for image in range(2):
            for channel in range(4):
                line = x[image, ..., channel].flatten()
                hidden = nn.functional.gelu(mlp.reads.T @ line + mlp.read_bias[:, 0])
                torch.testing.assert_close(mlp(x)[image, :, channel], mlp.writes @ hidden + mlp.write_bias[:, 0])


def test_another_grid_reads_and_writes_the_same_pattern():
    """A map that varies along no axis, read and written by weights that do not either, is mixed as on any grid."""
    mlp = randomised(TokenMlp((4, 4), 5)).double()
    with torch.no_grad():
        for weight in (mlp.reads, mlp.writes, mlp.write_bias):
            weight.copy_(weight[:1].expand_as(weight))
        value = torch.randn(1, 1, 1, 3, dtype=torch.float64)
        small, large = (mlp(value.expand(1, *grid, 3)) for grid in ((4, 4), (7, 9)))
    torch.testing.assert_close(large, small[:, :1].expand(1, 63, 3), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_another_grid_is_what_resampling_gives():
    small = randomised(create_model("ninformer_nano", num_classes=3)).eval()
    large = create_model("ninformer_nano", num_classes=3, img_size=(40, 56)).eval()
    report = load(large, small.state_dict())
    assert report.loaded == report.of and len(report.resized) == 3 * 2
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(large(image), small(image))


def test_a_watcher_sees_the_gate():
    mixer = nn.Sequential(randomised(MixerGating(Site(6, grid=(2, 3)))))
    x = torch.randn(2, 2, 3, 6)
    with torch.no_grad(), record(mixer) as r:
        out = mixer(x)
        gate = r["0"].parts[0].weights[..., 0].mT
        torch.testing.assert_close(mixer[0].proj(x).view(2, 6, 6) * gate, out.view(2, 6, 6))


@pytest.mark.parametrize("dims", [(16, 1.5), (32, 2.0)])
def test_both_branches_share_one_norm(dims):
    block = create_model("ninformer_nano", dim=dims[0], ratio=dims[1]).blocks[0]
    x = torch.randn(1, 64, dims[0])
    with torch.no_grad():
        first = x + block.mixer(block.norm(x).view(1, 8, 8, -1)).view_as(x)
        torch.testing.assert_close(block(x, 0, (8, 8)), first + block.mlp(block.norm(first)))
