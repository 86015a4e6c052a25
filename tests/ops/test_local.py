"""Products with the tokens around each token, three ways."""

from __future__ import annotations

import pytest
import torch

from saccade import record
from saccade.ops.local import TILE, local_scores, local_sum, neighbour_tokens


@pytest.mark.parametrize("window, dilation", [(3, 1), (5, 2), (3, 3)])
@pytest.mark.parametrize("grid", [(20, 33), (13, 9), (31,), (3, 7, 17), (1, 1)])
def test_scores_and_sums_from_their_definition(grid, window, dilation):
    """By shifts (with gradient) and by tiles (without), against a loop over what each token sees."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, *grid, 2, TILE, dtype=torch.float64).unbind()
    tokens = neighbour_tokens(grid, window, q.device, dilation)
    around = torch.cat([k.flatten(1, -3), k.new_zeros(2, 1, 2, TILE)], 1)[:, tokens]  # (B, N, window^n, h, d)
    wanted = torch.einsum("bnhd,bnohd->bnho", q.flatten(1, -3), around).unflatten(1, grid)
    with torch.no_grad():
        torch.testing.assert_close(local_scores(q, k, window, dilation), wanted)
    torch.testing.assert_close(local_scores(q.requires_grad_(), k, window, dilation), wanted)
    weights = torch.rand_like(wanted)
    mixed = torch.einsum("bnho,bnohd->bnhd", weights.flatten(1, -3), around).unflatten(1, grid)
    torch.testing.assert_close(local_sum(weights, k, window, dilation), mixed)
    with record(torch.nn.Sequential(torch.nn.Identity())):
        torch.testing.assert_close(local_scores(q, k, window, dilation), wanted)
