"""The wavelet transform: against loops, there and back, and what its six angles see."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.ops.wavelet import HIGH, LOW, dtcwt, inverse_dtcwt

GRIDS = [(8, 12), (7, 5), (1, 9), (6, 1), (1, 1), (2, 3)]


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_is_lost(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    low, high = dtcwt(x)
    half = [(side + 1) // 2 for side in grid]
    assert low.shape == (2, 2 * half[0], 2 * half[1], 3) and high.shape == (2, *half, 6, 2, 3)
    torch.testing.assert_close(inverse_dtcwt(low, high, grid), x, rtol=1e-12, atol=1e-12)


def mirrored(place: int, side: int) -> int:
    while not 0 <= place < side:
        place = -1 - place if place < 0 else 2 * side - 1 - place
    return place


def by_loops(x: torch.Tensor, down: tuple[float, ...], across: tuple[float, ...]) -> torch.Tensor:
    """Two filters on a map (H, W), the definition."""
    taps = [[*half, *reversed(half[:-1])] for half in (down, across)]
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for a, vertical in enumerate(taps[0]):
                for b, horizontal in enumerate(taps[1]):
                    row = mirrored(i + a - len(down) + 1, x.shape[0])
                    column = mirrored(j + b - len(across) + 1, x.shape[1])
                    out[i, j] += vertical * horizontal * x[row, column]
    return out


def test_against_loops():
    x = torch.randn(4, 6, dtype=torch.float64)
    low, high = dtcwt(x[None, ..., None])
    torch.testing.assert_close(low[0, ..., 0], by_loops(x, LOW, LOW))
    for place, (down, across) in enumerate(((HIGH, LOW), (HIGH, HIGH), (LOW, HIGH))):
        band = by_loops(x, down, across) / math.sqrt(2)
        a, b, c, d = band[::2, ::2], band[::2, 1::2], band[1::2, ::2], band[1::2, 1::2]
        torch.testing.assert_close(high[0, :, :, place, 0, 0], a - d)
        torch.testing.assert_close(high[0, :, :, place, 1, 0], b + c)
        torch.testing.assert_close(high[0, :, :, 5 - place, 0, 0], a + d)
        torch.testing.assert_close(high[0, :, :, 5 - place, 1, 0], b - c)


def test_an_odd_side_is_made_even_by_repeating_its_end():
    x = torch.randn(1, 5, 7, 2, dtype=torch.float64)
    longer = torch.cat([x, x[:, -1:]], 1)
    longer = torch.cat([longer, longer[:, :, -1:]], 2)
    for got, wanted in zip(dtcwt(x), dtcwt(longer)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("angle", "place"), [(15, 0), (45, 1), (75, 2), (105, 3), (135, 4), (165, 5)])
def test_each_angle_sees_its_own_waves(angle, place):
    """A plane wave whose crests stand at an angle is strongest in the coefficients of that angle."""
    steep = math.radians(angle)
    frequency = 0.75 * math.pi if angle not in (45, 135) else math.pi
    rows, columns = torch.meshgrid(*[torch.arange(32, dtype=torch.float64)] * 2, indexing="ij")
    wave = (frequency * (math.cos(steep) * rows + math.sin(steep) * columns)).cos()
    energy = dtcwt(wave[None, ..., None])[1][0, 5:-5, 5:-5].square().sum((0, 1, 3, 4))
    assert int(energy.argmax()) == place, energy


def test_a_constant_map_has_no_details():
    low, high = dtcwt(torch.full((1, 9, 6, 1), 3.0, dtype=torch.float64))
    torch.testing.assert_close(low, torch.full_like(low, 3.0))
    assert high.abs().max() < 1e-12
