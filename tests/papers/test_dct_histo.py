"""DCT-HistoTransformer has no golden and no published totals: a reference in loops, and what its branches promise."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import SaccadeError, Site, create_mixer, create_model
from saccade.ops.cosine import cosine_transform
from saccade.papers.dct_histo import DctAttention, DctConvBlock
from tests.contracts.registered import randomised


def built(grid=(8, 8), dim=12, heads=3, **options) -> DctAttention:
    torch.manual_seed(0)
    site = Site(dim, heads, grid=grid)
    return randomised(create_mixer("dct_attention", site, **options)).double().eval()


def waves(u: int, v: int, grid: tuple[int, int]) -> torch.Tensor:
    """The picture of one frequency."""
    axes = []
    for frequency, side in ((u, grid[0]), (v, grid[1])):
        scale = math.sqrt((1 if frequency == 0 else 2) / side)
        axes.append(torch.tensor([scale * math.cos(math.pi / side * (place + 0.5) * frequency)
                                  for place in range(side)], dtype=torch.float64))
    return axes[0][:, None] * axes[1]


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_against_loops(grid):
    mixer, x = built(grid), torch.randn(*grid, 12, dtype=torch.float64)
    rows, columns = math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)
    pictures = [waves(u, v, grid) for u in range(rows) for v in range(columns)]
    with torch.no_grad():
        low = torch.stack([(x * picture[..., None]).sum((0, 1)) for picture in pictures])
        tokens = mixer.norm(low) + mixer.position.table[0]
        q, k, v = mixer.qkv(tokens).chunk(3, -1)
        attended = []
        for query in q:
            heads = []
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                weights = torch.stack([query[part] @ key[part] / 2 for key in k]).softmax(0)
                heads.append(weights @ v[:, part])
            attended.append(torch.cat(heads))
        low = low + mixer.proj(torch.stack(attended))
        wanted = sum(picture[..., None] * coefficient for picture, coefficient in zip(pictures, low))
        torch.testing.assert_close(mixer(x[None])[0], wanted)


def test_no_frequency_beyond_the_cut_comes_out():
    mixer, x = built((10, 7)), torch.randn(2, 10, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        spectrum = cosine_transform(mixer(x), (10, 7))
        assert spectrum[:, :5, :4].abs().max() > 0.1
        spectrum[:, :5, :4] = 0
        assert spectrum.abs().max() < 1e-12


def test_what_keeps_all_and_attends_to_nothing_is_the_identity():
    mixer, x = built(keep=1.0), torch.randn(2, 8, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        mixer.proj.weight.zero_()
        mixer.proj.bias.zero_()
        torch.testing.assert_close(mixer(x), x)
        low = built(keep=0.25)
        low.proj.weight.zero_()
        low.proj.bias.zero_()
        torch.testing.assert_close(low(low(x)), low(x))  # a projection


def test_a_number_of_frequencies_is_the_same_on_every_grid():
    mixer = built(keep=4)
    for grid in ((8, 8), (16, 30), (3, 9)):
        assert mixer.kept(grid) == (min(4, grid[0]), 4)
        assert mixer(torch.randn(1, *grid, 12, dtype=torch.float64)).shape == (1, *grid, 12)
    site = Site(12, 3)
    attention = 4 * 16 * 12 * 12 + 2 * 16 * 16 * 12
    assert mixer.cost(site, (8, 8)) == attention + 2 * 12 * (4 * 8 * 8 + 4 * 4 * 8)
    half = built()
    assert half.kept((7, 8)) == (4, 4)
    pairs = [2 * math.prod(kept) ** 2 * 12 for kept in (half.kept((8, 8)), (8, 8))]
    assert pairs[1] == 16 * pairs[0]


def test_the_convolution_moves_along_with_the_image_and_the_frequencies_do_not():
    site = Site(12, 3, grid=(12, 12))
    block = randomised(DctConvBlock(site, DctAttention(site))).double().eval()
    x = torch.randn(1, 12, 12, 12, dtype=torch.float64)
    moved = x.roll(2, 1)
    inner = (slice(None), slice(4, 10), slice(2, 10))
    with torch.no_grad():
        torch.testing.assert_close(block.local(moved)[inner], block.local(x).roll(2, 1)[inner])
        assert not torch.allclose(block.mixer(moved)[inner], block.mixer(x).roll(2, 1)[inner])
        joined = block.join(torch.cat([block.mixer(x), block.local(x)], -1))
        torch.testing.assert_close(block(x), joined)


def test_the_model_as_described():
    model = create_model("dct_histotransformer", features_only=True).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16] and model.feature_info.channels() == [32, 64, 128, 256]
    blocks = [[block.mixer for block in stage.blocks] for stage in model.model.stages]
    assert [len(stage) for stage in blocks] == [1, 2, 2, 2] and blocks[0] == [None]
    assert all(isinstance(mixer, DctAttention) for stage in blocks[1:] for mixer in stage)
    assert [stage[0].position.grid for stage in blocks[1:]] == [(28, 28), (14, 14), (7, 7)]
    with torch.no_grad():
        tissue = create_model("dct_histo").eval()(torch.randn(1, 3, 115, 175))  # BreakHis' shape, a quarter of it
    assert tissue.shape == (1, 2)


@pytest.mark.parametrize("keep", [0, -0.5, 2.5])
def test_what_keeps_nothing_is_one_line(keep):
    with pytest.raises(SaccadeError, match="keep="):
        create_mixer("dct_attention", Site(12, 3), keep=keep)
