"""Hyena N-D: its directions and orders against each other, ranks, the hybrid network, bad input."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade import SaccadeError, Site, create_model
from saccade.ops.spectral import convolve
from saccade.papers.hyena_nd import HyenaNd
from saccade.parts.attention import Attention
from tests.contracts.registered import randomised


def made(grid, **options):
    torch.manual_seed(0)
    return randomised(HyenaNd(Site(4, grid=grid), width=8, **options)).double().eval()


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2), (1, 6)])
def test_convolution_offset_by_offset(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    kernel = torch.randn(*(2 * side - 1 for side in grid), 3, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    places = list(product(*map(range, grid)))
    for to, start in product(places, places):
        offset = tuple(a - b for a, b in zip(to, start))  # a negative one counts from the end
        wanted[(slice(None), *to)] += kernel[offset] * x[(slice(None), *start)]
    torch.testing.assert_close(convolve(x, kernel), wanted)


@pytest.mark.parametrize("grid", [(6,), (3, 5), (2, 3, 4)])
def test_one_convolution_with_all_directions_is_the_sum_of_each(grid):
    """4dir by its merged filter against the definition: turn the map, look back, turn it round again."""
    mixer, x = made(grid, direction="4dir"), torch.randn(2, *grid, 4, dtype=torch.float64)
    gate, second, v = mixer.short(mixer.in_proj(x)).chunk(3, -1)
    kernel = mixer.filter(grid) / (2 * max(grid))
    back = torch.zeros(*(2 * side for side in grid), 4, dtype=torch.float64)
    back[tuple(slice(side) for side in grid)] = kernel
    ways = []
    for turn in mixer.turns:
        axes = [axis + 1 for axis in turn]
        u = (v * second).flip(axes)
        ways.append(gate * (convolve(u, back) + u * mixer.bias).flip(axes))
    assert len(ways) == 2 ** len(grid)
    torch.testing.assert_close(mixer(x), mixer.out_proj(mixer.mix(torch.stack(ways, -1)).squeeze(-1)))


@pytest.mark.parametrize("options", [
    dict(direction="4dirp"), dict(direction="parallel", order=3), dict(direct=True), dict(window="learn", joint=False),
    dict(window="no", joint=False), dict(window="learn", root=True, bands=2, depth=1), dict(order=3, direction="4dir"),
])
@pytest.mark.parametrize("grid", [(5,), (4, 4), (2, 3, 4)])
def test_every_setting_on_other_grids(options, grid):
    mixer = made(grid, **options)
    for other in (grid, tuple(side + 2 for side in grid), (1,) * len(grid)):
        out = mixer(torch.randn(2, *other, 4, dtype=torch.float64))
        assert out.shape == (2, *other, 4) and out.isfinite().all()


def test_even_blocks_look_ahead_and_odd_ones_back():
    for index, ahead in ((0, True), (1, False)):
        mixer = HyenaNd(Site(4, index=index, grid=(9,)), width=8).double()
        x = torch.randn(1, 9, 4, dtype=torch.float64)
        moved = x.clone()
        moved[0, 4] += 1
        change = (mixer(moved) - mixer(x)).abs().amax(-1)[0] > 1e-12
        assert change[:3].all() == ahead and change[6:].all() != ahead


def test_hybrid_has_hyena_first_and_attention_after():
    kinds = [type(block.mixer) for block in create_model("hyena2dattn_deit_tiny").blocks]
    assert kinds == [HyenaNd] * 7 + [Attention] * 5
    out = create_model("hyena2dattn_deit_nano", num_classes=3)(torch.randn(2, 3, 32, 40))
    assert out.shape == (2, 3)


def test_what_makes_no_sense_is_one_line():
    for options, said in ((dict(direction="diagonal"), "4dirp"), (dict(order=1), "at least 2"),
                          (dict(window="round"), "learn")):
        with pytest.raises(SaccadeError, match=said):
            HyenaNd(Site(4), **options)
