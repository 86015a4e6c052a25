"""Matrices of offsets, against loops over pairs of tokens."""

from itertools import product

import pytest
import torch
from torch import Tensor

from saccade.ops import toeplitz as module
from saccade.ops.toeplitz import attend_at_offsets, toeplitz


def slow(offsets: Tensor, grid: tuple[int, ...]) -> Tensor:
    tokens = list(product(*map(range, grid)))
    out = torch.empty(offsets.shape[0], len(tokens), len(tokens), dtype=offsets.dtype)
    for (i, query), (j, key) in product(enumerate(tokens), enumerate(tokens)):
        place = [b - a + side - 1 for a, b, side in zip(query, key, grid, strict=True)]
        out[:, i, j] = offsets[(slice(None), *place)]
    return out


@pytest.mark.parametrize("grid", [(7,), (1, 5), (4, 3), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("whole", [1, 30, 2**20])
def test_attention_with_a_bias_an_offset_in_parts_and_at_once(grid, whole, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", whole)
    torch.manual_seed(0)
    N = torch.Size(grid).numel()
    q, k, v = torch.randn(3, 2, 2, N, 4, dtype=torch.float64)
    offsets = torch.randn(2, *(2 * side - 1 for side in grid), dtype=torch.float64)
    bias = slow(offsets, grid)
    assert torch.equal(toeplitz(offsets, grid), bias)
    wanted = (q @ k.mT / 2 + bias).softmax(-1) @ v
    torch.testing.assert_close(attend_at_offsets(q, k, v, offsets, grid), wanted)  # gradients are on: at once
    with torch.inference_mode():
        torch.testing.assert_close(attend_at_offsets(q, k, v, offsets, grid), wanted)
        other = (0.3 * q @ k.mT + bias).softmax(-1) @ v
        torch.testing.assert_close(attend_at_offsets(q, k, v, offsets, grid, scale=0.3), other)
