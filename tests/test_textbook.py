"""Every mixer that has a textbook form computes what that form computes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.textbook import forms
from tests.contracts.registered import mixer


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (9, 13)])
@pytest.mark.parametrize("name", forms())
def test_mixer_equals_its_textbook_form(name, grid):
    module = mixer(name, grid=grid).double()
    x = torch.randn(2, *grid, 32, dtype=torch.float64, requires_grad=True)
    ours, wanted = module(x), forms()[name](module, x)
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-8)
    cotangent = torch.randn_like(ours)
    for got, want in zip(*(torch.autograd.grad(out, x, cotangent) for out in (ours, wanted))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
