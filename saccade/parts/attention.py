"""Multi-head self-attention over all tokens: what other mixers are measured against."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.tokens import global_tokens, join, split


def check_heads(site: Site) -> int:
    """Channels a head; raises where the heads do not divide the width."""
    if site.dim % site.heads:
        raise SaccadeError(f"{site.heads} heads do not divide {site.dim} channels; choose a divisor")
    return site.dim // site.heads


class Attention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v), q, k, v = split(qkv(x)), over all tokens of (B, *grid, C) and the prefix.

    (Vaswani et al., "Attention Is All You Need", 2017, section 3.2; Dosovitskiy et al., "An Image is Worth 16x16
    Words", 2021, appendix A.)
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d)", "softmax", "sum of v")

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    @overload
    def forward(self, x: Tensor, prefix: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = join(x, prefix)
        B, N, C = tokens.shape
        q, k, v = self.qkv(tokens).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=lambda: global_tokens(N, x.device))
        out = self.proj(out.transpose(1, 2).reshape(B, N, C))
        return split(out, x, prefix)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products with N tokens."""
        tokens = torch.Size(grid).numel() + prefix
        return 4 * tokens * site.dim**2 + 2 * tokens**2 * site.dim


class CrossAttention(nn.Module):
    """proj(softmax(q(x) k(context)^T / sqrt(d)) v(context)): (B, N, C), (B, M, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(Site(dim, heads))
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # no `where`: its tokens may be on no grid
