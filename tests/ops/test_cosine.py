"""The cosine transform: against the sum that defines it and scipy's, there and back, what is kept and what is not."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.ops.cosine import cosine_basis, cosine_transform, inverse_cosine_transform

GRIDS = [(5,), (4, 6), (7, 5), (1, 9), (3, 4, 5)]


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_is_lost_and_energy_stays(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    coefficients = cosine_transform(x, grid)
    torch.testing.assert_close(inverse_cosine_transform(coefficients, grid), x)
    torch.testing.assert_close(coefficients.flatten(1, -2).norm(dim=1), x.flatten(1, -2).norm(dim=1))


def test_against_the_sum():
    x = torch.randn(4, 5, dtype=torch.float64)
    wanted = torch.zeros(4, 5, dtype=torch.float64)
    for u in range(4):
        for v in range(5):
            weight = math.sqrt((1 if u == 0 else 2) / 4 * (1 if v == 0 else 2) / 5)
            for i in range(4):
                for j in range(5):
                    waves = math.cos(math.pi / 4 * (i + 0.5) * u) * math.cos(math.pi / 5 * (j + 0.5) * v)
                    wanted[u, v] += weight * waves * x[i, j]
    torch.testing.assert_close(cosine_transform(x[None, ..., None], (4, 5))[0, ..., 0], wanted)


@pytest.mark.parametrize("grid", GRIDS)
def test_as_scipy_has_it(grid):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    wanted = fft.dctn(x.numpy(), axes=tuple(range(1, len(grid) + 1)), norm="ortho")
    torch.testing.assert_close(cosine_transform(x, grid), torch.from_numpy(wanted))


def test_low_frequencies_alone():
    """The first rows and columns of the whole spectrum; on the way back the rest is zero."""
    x = torch.randn(1, 6, 7, 2, dtype=torch.float64)
    whole, low = cosine_transform(x, (6, 7)), cosine_transform(x, (2, 4))
    torch.testing.assert_close(low, whole[:, :2, :4])
    again = cosine_transform(inverse_cosine_transform(low, (6, 7)), (6, 7))
    torch.testing.assert_close(again[:, :2, :4], low)
    again[:, :2, :4] = 0
    assert again.abs().max() < 1e-12


def test_a_constant_map_is_one_number():
    coefficients = cosine_transform(torch.full((1, 6, 8, 1), 3.0, dtype=torch.float64), (6, 8))[0, ..., 0]
    assert float(coefficients[0, 0]) == pytest.approx(3 * math.sqrt(48))
    coefficients[0, 0] = 0
    assert coefficients.abs().max() < 1e-12


def test_half_precision_is_computed_in_single():
    x = torch.randn(1, 16, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = cosine_transform(x.bfloat16(), (16, 16))
        back = inverse_cosine_transform(coefficients, (16, 16))
    assert coefficients.dtype == torch.float32
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=1e-5, atol=1e-5)


def test_rows_are_orthonormal():
    basis = cosine_basis(9, 9, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(basis @ basis.T, torch.eye(9, dtype=torch.float64))
