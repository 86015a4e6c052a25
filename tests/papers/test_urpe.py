"""URPE: what its factor adds to relative attention, buckets, pieces, padding."""

from __future__ import annotations

import pytest
import torch

from saccade import Site
from saccade.ops import toeplitz
from saccade.papers.urpe import Offsets, UniversalEncoder, UniversalRelative
from tests.contracts.registered import randomised


def made(grid=(7,), **options):
    torch.manual_seed(0)
    return randomised(UniversalRelative(Site(16, 2, grid=grid), **options)).double().eval()


def test_tokens_that_are_alike_stay_alike_without_the_factor():
    """The paper's negative result: rows of a softmax sum to one, so only the factor tells where a token stands."""
    mixer, x = made(), torch.ones(1, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        assert mixer(x).std(1).max() > 1e-2
        mixer.factor.table.fill_(1.0)
        assert mixer(x).std(1).max() < 1e-12


@pytest.mark.parametrize("grid", [(5,), (11,), (3, 4), (2, 3, 2)])
def test_every_pair_in_a_loop(grid):
    """Smaller, larger and other grids: each pair takes the entry of its offset, or of the farthest there is."""
    native = tuple(4 for _ in grid)
    mixer = made(native)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    q, k, v = mixer.qkv(x).flatten(1, -2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    places = list(torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist())
    entry = [[tuple(min(max(b - a, -3), 3) + 3 for a, b in zip(here, there)) for there in places] for here in places]
    bias, factor = (torch.stack([torch.stack([one.table[(slice(None), *at)] for at in row], -1) for row in entry], -2)
                    for one in (mixer.bias, mixer.factor))
    weights = (q @ k.mT / 8**0.5 + bias).softmax(-1) * factor
    wanted = mixer.proj((weights @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(mixer(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), wanted)


def test_pieces_of_queries_change_nothing(monkeypatch):
    mixer, x = made((9, 5)), torch.randn(2, 9, 5, 16, dtype=torch.float64)
    monkeypatch.setattr(toeplitz, "WHOLE", 2 * 2 * 5 * 45)  # two rows of queries a piece, and one left
    wanted = mixer(x)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), wanted)


def test_buckets():
    """Near offsets have rows of their own, far ones share them by their logarithm; two rows are never used."""
    offsets = Offsets(1, (200,), buckets=64)
    with torch.no_grad():
        offsets.table.copy_(torch.arange(65.0)[None])
    rows = offsets((200,))[0].long().tolist()
    assert rows[199 - 3:199 + 4] == [28, 29, 30, 33, 34, 35, 36]
    assert rows[0] == rows[199 - 128] == 0 and rows[-1] == rows[199 + 128] == 64
    assert rows == sorted(rows) and set(range(65)) - set(rows) == {31, 32}
    assert offsets((3,))[0].tolist() == [29, 30, 33, 34, 35]


def test_padding_is_not_looked_at():
    torch.manual_seed(0)
    encoder = UniversalEncoder(50, 16, 2, 2, 32, 12, buckets=(None, None)).double().eval()
    tokens = torch.randint(2, 50, (1, 9))
    padded = torch.cat([tokens, torch.ones(1, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(encoder(padded)[:, :9], encoder(tokens))
