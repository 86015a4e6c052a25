"""Windows whose masked biases are laid out some at a time give what all at once give."""

from __future__ import annotations

import pytest
import torch

from saccade import Site
from saccade.parts import window
from saccade.parts.window import ShiftingAttention
from saccade.tools.measure import peak_memory


@pytest.mark.parametrize("grid", [(12, 20), (9, 14)])
@pytest.mark.parametrize("numbers", [1, 700, 10**9])  # a window, two windows, all
def test_in_parts_as_at_once(monkeypatch, grid, numbers):
    torch.manual_seed(0)
    mixer, x = ShiftingAttention(Site(8, 2, grid=grid), 4, 2).double(), torch.randn(3, *grid, 8, dtype=torch.double)
    expected = mixer(x)  # with a gradient: at once
    monkeypatch.setattr(window, "LAID", numbers)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), expected.detach())
    assert expected.requires_grad


def test_what_is_laid_out_at_once_bounds_memory(monkeypatch):
    mixer, x = ShiftingAttention(Site(8, 2, grid=(64, 64)), 16, 8), torch.randn(1, 64, 64, 8)
    with torch.no_grad():
        mixer(x)  # the table of masks is kept
        monkeypatch.setattr(window, "LAID", 2 * 256**2)  # of one window
        parts = peak_memory(lambda: mixer(x))
        monkeypatch.setattr(window, "LAID", 10**9)
        whole = peak_memory(lambda: mixer(x))
    assert whole > 16 * 2 * 256**2 * 4 and parts < whole - 12 * 2 * 256**2 * 4
