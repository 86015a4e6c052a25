"""Attention with fewer keys than queries: the module that PVT and its kin share."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from saccade.core.record import Where
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import check_heads
from saccade.parts.convolution import at_least, grid_conv
from saccade.parts.tokens import join, split, strided_tokens, token_numbers


class SpatialReduction(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v), k and v of maps merged `reduction` x `reduction`.

    (B, *grid, C) -> (B, *grid, C). Tokens beyond a multiple of `reduction` have queries and no key, as in the authors'
    convolution. Prefix tokens are keys too. (Wang et al., "Pyramid Vision Transformer", 2021, equations 1-3.)
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    template = Template("q k^T / sqrt(d) to a map merged by convolution", "softmax", "sum of v, merged")

    def __init__(self, site: Site, reduction: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.reduction = site.heads, reduction
        self.q = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.kv = nn.Linear(site.dim, 2 * site.dim, bias=qkv_bias)
        self.merge = self.merging(site)
        self.proj = nn.Linear(site.dim, site.dim)

    def merging(self, site: Site) -> nn.Module:
        """The layers that make a key of R x R tokens."""
        if self.reduction == 1:
            return nn.Identity()
        conv = grid_conv(site.rank, site.dim, site.dim, self.reduction, stride=self.reduction)
        return nn.Sequential(conv, nn.LayerNorm(site.dim))

    def merged(self, x: Tensor) -> Tensor:
        """The map that keys and values are made of."""
        return self.merge(at_least(x, self.reduction, first=1))

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Any:
        merged = self.merged(x)
        q = self.q(join(x, prefix)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(join(merged, prefix)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        where = self.where(x, merged, 0 if prefix is None else prefix.shape[1])
        out = attend(q, k, v, where=where)
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)

    def where(self, x: Tensor, merged: Tensor, prefix: int) -> Where | None:
        """A key stands for the token in the middle of those that it merges."""
        grid, reduced = tuple(x.shape[1:-1]), tuple(merged.shape[1:-1])

        def tokens() -> tuple[Tensor, Tensor]:
            queries = token_numbers(prod(grid) + prefix, x.device)
            return queries, strided_tokens(grid, reduced, self.reduction, prefix, x.device)

        return tokens

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds of N queries and M keys: projections 2 (N + M) C^2, merging M R^rank C^2, attention 2 N M C."""
        cells = self.cells(grid)
        merging = 0 if isinstance(self.merge, nn.Identity) else cells * self.reduction**site.rank * site.dim
        queries, keys = prod(grid) + prefix, cells + prefix
        return site.dim * (2 * (queries + keys) * site.dim + merging + 2 * queries * keys)

    def cells(self, grid: tuple[int, ...]) -> int:
        """How many keys there are on a grid."""
        return prod(max(side // self.reduction, 1) for side in grid)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, merged with its neighbours."""
        return None
