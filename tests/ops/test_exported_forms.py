"""What stands in for operators that ONNX does not take at free sizes has the same numbers."""

from __future__ import annotations

import pytest
import torch

from saccade import Site, create_mixer
from saccade.ops.pooling import adaptive_mean
from saccade.ops.sizes import ceil_div, modulo
from saccade.ops.spectral import complex_product, convolve, fourier, global_filter, inverse_fourier, on_circle
from tests.contracts.registered import randomised


@pytest.fixture
def both(monkeypatch):
    """A function's value as it is, and as it is exported."""

    def run(function):
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
        usual = function()
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        return usual, function()

    return run


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (1, 4), (9,), (3, 4, 5)])
def test_fourier(both, grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    usual, exported = both(lambda: fourier(x))
    torch.testing.assert_close(exported, usual)
    usual, exported = both(lambda: inverse_fourier(fourier(x), grid))
    torch.testing.assert_close(usual, x)
    torch.testing.assert_close(exported, x)
    weight = torch.randn(*[4] * len(grid), 3, 2, dtype=torch.float64)
    torch.testing.assert_close(*both(lambda: global_filter(x, weight)))


def test_products_and_convolutions(both):
    a, b = torch.randn(2, 5, 4, 2, dtype=torch.float64)
    usual, exported = both(lambda: complex_product(a, b))
    wanted = torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))
    torch.testing.assert_close(usual, wanted)
    torch.testing.assert_close(exported, wanted)
    x, kernel = torch.randn(2, 5, 6, 3, dtype=torch.float64), torch.randn(5, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(*both(lambda: convolve(x, on_circle(kernel))))


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (4, 1), (9, 13)])
def test_adaptive_mean(both, size):
    x = torch.randn(2, 9, 13, 4, dtype=torch.float64)
    torch.testing.assert_close(*both(lambda: adaptive_mean(x, size)))


def test_convolution_with_kernels_made_from_the_map(both):
    mixer = randomised(create_mixer("attentive_convolution", Site(8, grid=(6, 9)))).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(*both(lambda: mixer(x)))


def test_whole_numbers():
    for size in range(40):
        for part in range(1, 9):
            assert ceil_div(size, part) == -(-size // part)
            assert modulo(torch.tensor(size), part) == size % part
