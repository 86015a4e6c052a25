"""Vision Mamba's mixer: its symmetry, and where prefix tokens stand."""

from __future__ import annotations

import torch

from saccade import Site
from saccade.papers.vim import BidirectionalMamba
from tests.contracts.registered import randomised


def test_a_reversed_sequence_with_the_directions_exchanged():
    site = Site(16, grid=(9,))
    mixer, other = randomised(BidirectionalMamba(site)).double(), BidirectionalMamba(site).double()
    names = {"forwards": "backwards", "backwards": "forwards"}
    state = {".".join(names.get(part, part) for part in name.split(".")): value
             for name, value in mixer.state_dict().items()}
    other.load_state_dict(state)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(other(x.flip(1)), mixer(x).flip(1))


def test_prefix_tokens_stand_in_the_middle():
    mixer = randomised(BidirectionalMamba(Site(16, grid=(3, 3))))
    x, prefix = torch.randn(2, 3, 3, 16), torch.randn(2, 2, 16)
    tokens = torch.cat([x.flatten(1, 2)[:, :4], prefix, x.flatten(1, 2)[:, 4:]], 1)
    whole = mixer(tokens)
    out, out_prefix = mixer(x, prefix=prefix)
    torch.testing.assert_close(out_prefix, whole[:, 4:6])
    torch.testing.assert_close(out.flatten(1, 2), torch.cat([whole[:, :4], whole[:, 6:]], 1))
    assert mixer.cost(Site(16), (3, 3), prefix=2) == mixer.cost(Site(16), (11,))


def test_the_mean_is_half_the_sum():
    site = Site(16, grid=(5,))
    mixer, total = BidirectionalMamba(site), BidirectionalMamba(site, mean=False)
    total.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(mixer(x), total(x) / 2)
