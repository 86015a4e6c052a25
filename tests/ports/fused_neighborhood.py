"""Neighborhood attention by its op, with the set of neighbours that it saw."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.ops.neighborhood import neighborhood_attention
from tests.ports.port import Port


class AttentionAndNeighbours(nn.Module):
    """The op on q, k, v (B, *grid, heads, d), and the 0/1 matrix (N, N) of who sees whom."""

    def __init__(self, **settings: tuple[int, ...]) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        grid = tuple(q.shape[1:-2])
        tokens = torch.eye(prod(grid)).view(1, *grid, 1, -1)  # values that tell tokens apart, under equal weights
        seen = neighborhood_attention(*[torch.zeros_like(tokens)] * 2, tokens, **self.settings) > 0
        return neighborhood_attention(q, k, v, **self.settings), seen.view(prod(grid), -1).float()

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...]) -> int:
        """What the golden counted: the published mask was evaluated densely, on all N x N pairs of each head."""
        *grid, heads = grid
        return 2 * prod(grid) ** 2 * heads * site.dim


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    names = {"kernel_size": "kernel", "dilation": "dilation", "stride": "stride", "is_causal": "causal"}
    module = AttentionAndNeighbours(**{ours: tuple(args[name]) for name, ours in names.items() if name in args})
    return Port(module, lambda state: {}, outputs=lambda result: dict(zip(golden["outputs"], result)))
