"""Combiner: attention to every token at the price of a sparse pattern.

Attention is an expectation over tokens j. Combiner factorises its distribution: tokens near i directly, every region r
of the others by one abstraction, itself an expectation over the region's tokens,
    A_i(j) = p_i(j) near i,      A_i(j) = p_i(r) p(j | r) in region r,      out_i = proj(sum_j A_i(j) v_j),
with one softmax over the tokens near i and the regions together. A is full, its rows sum to one, and N tokens in rows
of about sqrt(N) cost N sqrt(N).

Two of the paper's patterns. Fixed: near are the tokens of the own row; a row is a region, with the largest of its keys
for its key and p(j | r) = softmax_j(max of its queries . k_j). Axial: rows are summarised once for every column t, by
the attention p(j | r, t) of the row's own token in that column, and the key of r is a layer of what that gives.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai, "Combiner: Full Attention Transformer with Sparse Computation Cost",
2021, sections 3 and 4.

Any grid: rows are those of the last axis; a sequence is cut into rows of about its square root, padded and masked.
Quirks kept: without `causal` the own row counts twice, token by token and as a region; queries are scaled once, before
anything is taken of them.
"""

from __future__ import annotations

from math import isqrt, prod

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.sizes import ceil_div
from saccade.ops.window import crop, pad_to_multiple
from saccade.parts.attention import check_heads
from saccade.parts.tokens import global_tokens

CARD = Card(
    "Combiner: Full Attention Transformer with Sparse Computation Cost",
    authors="Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai",
    year=2021,
    systems=("combiner",),
    arxiv="2107.05768",
    code="google-research/google-research@4c4299485",
    licence="Apache-2.0",
    keywords="structured factorization, conditional expectation, abstraction, sparse attention, full attention",
    kinds=("mixer",),
    mixers={"combiner_fixed": "CombinerFixed", "combiner_axial": "CombinerAxial"},
    tests=("tests/papers/test_combiner.py",),
)


class CombinerFixed(nn.Module):
    """Direct attention in the own row, and to one abstraction of every row: (B, *grid, C) -> (B, *grid, C).

    `row` is the length of a sequence's rows (by default about the root of the native length). `causal` sees, in
    row-major order, what comes up to a token: of its own row directly, of the rows before by their abstractions.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) in the row; q s^T to abstractions of rows",
        "one softmax, factored",
        "sum of v and of abstractions of v",
    )

    def __init__(self, site: Site, row: int | None = None, causal: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.scale = check_heads(site) ** -0.5
        if row is not None and (row < 1 or site.rank > 1):
            raise SaccadeError(f"row={row} on the grid {site.grid}: at least 1 token of a sequence; maps have rows")
        self.heads, self.causal = site.heads, causal
        self.row = isqrt(site.grid[0] - 1) + 1 if row is None and site.rank == 1 else row
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        grid, valid = tuple(x.shape[1:-1]), None
        tokens = x
        if self.row is not None:
            tokens = pad_to_multiple(x, (self.row,)).unflatten(1, (-1, self.row))
            valid = pad_to_multiple(x.new_ones(1, *grid, 1), (self.row,)).view(1, 1, -1, self.row) > 0
        tokens = tokens.flatten(1, -3)  # (B, S, T, C)
        B, S, T, C = tokens.shape
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)  # (B, heads, S, T, d)
        q = q * self.scale
        mean, share, key = self.abstractions(q, k, v, valid)
        keys = torch.cat([k, key[:, :, None].expand(-1, -1, S, -1, -1)], 3)
        values = torch.cat([v, mean[:, :, None].expand(-1, -1, S, -1, -1)], 3)
        bias = self.mask(S, T, valid, q)
        if recording():
            logits = q @ keys.mT
            weights = (logits if bias is None else logits + bias).softmax(-1)
            count = prod(grid)
            note(effective(weights, share)[..., :count, :count], lambda: global_tokens(count, x.device))
            out = weights @ values
        else:
            q, keys, values = (each.transpose(1, 2).flatten(0, 1) for each in (q, keys, values))  # rows beside images
            mask = None if bias is None else bias.expand(B, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)
            out = attend(q, keys, values, mask, scale=1.0).unflatten(0, (B, S)).transpose(1, 2)
        out = self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2))
        return out.view(x.shape) if self.row is None else crop(out.flatten(1, 2), grid)

    def abstractions(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row: its value and key (B, heads, S, d), and the share p(j | r) (B, heads, S, T) of its tokens."""
        query, key = q, k
        if valid is not None:
            query, key = (each.masked_fill(~valid[..., None], -torch.inf) for each in (q, k))
        logits = query.amax(-2, keepdim=True) @ k.mT
        share = (logits if valid is None else logits.masked_fill(~valid[..., None, :], -torch.inf)).softmax(-1)
        return (share @ v).squeeze(-2), share.squeeze(-2), key.amax(-2)

    def mask(self, rows: int, length: int, valid: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the logits (1, 1, S, T, T + S) of tokens and rows; None where all may be seen."""
        if valid is None and not self.causal:
            return None
        seen = torch.ones(1, 1, rows, length, length + rows, dtype=torch.bool, device=like.device)
        if valid is not None:
            seen = seen & torch.cat([valid[..., None, :], seen[..., :1, length:]], -1)
        if self.causal:
            place = torch.arange(length, device=like.device)
            row = torch.arange(rows, device=like.device)
            direct = (place <= place[:, None]).expand(rows, -1, -1)
            before = (row < row[:, None])[:, None].expand(-1, length, -1)
            seen = seen & torch.cat([direct, before], -1)
        return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -torch.inf)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2, 2 N (T + S) C for T tokens and S rows, 2 N C for the abstractions."""
        length = self.row or grid[-1]
        rows = ceil_div(prod(grid), length)
        tokens = rows * length
        return 4 * tokens * site.dim**2 + 2 * tokens * (length + rows + 1) * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def effective(weights: Tensor, share: Tensor) -> Tensor:
    """A (B, heads, N, N) from the weights (B, heads, S, T, T + S) and the shares (B, heads, S, T) of rows."""
    rows, length = share.shape[-2:]
    direct, region = weights.split([length, rows], -1)
    whole = region[..., None] * share[:, :, None, None]  # (B, heads, S, T, S', T')
    own = torch.eye(rows, dtype=weights.dtype, device=weights.device)[:, None, :, None]
    return (whole + direct[..., None, :] * own).flatten(-2).flatten(2, 3)


class CombinerAxial(nn.Module):
    """Direct attention in the own row, and to each row's summary for the own column: (B, *grid, C) -> (B, *grid, C)."""

    ranks, weights = (2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) in the row; q s^T to summaries of rows",
        "one softmax, factored",
        "sum of v and of summaries of v",
    )

    def __init__(self, site: Site, bias: bool = False) -> None:
        super().__init__()
        self.scale = check_heads(site) ** -0.5
        if site.rank < 2:
            raise SaccadeError(f"the grid {site.grid} has one axis, and axial attention needs rows and columns")
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=bias)
        self.summary = nn.Linear(site.dim, site.dim, bias=bias)
        self.norm = nn.LayerNorm(site.dim)
        self.summary_key = nn.Linear(site.dim, site.dim, bias=bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -3)  # (B, S, T, C)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)  # (B, heads, S, T, d)
        q = q * self.scale
        logits = q @ k.mT
        share = logits.softmax(-1)  # of row s, seen from its token t: (B, heads, S, T, T')
        mean = share @ v
        merged = mean.permute(0, 2, 3, 1, 4).flatten(-2)
        key = self.summary_key(self.norm(self.summary(merged) + tokens)).unflatten(-1, (self.heads, -1))
        columns = q.transpose(2, 3) @ key.permute(0, 3, 2, 4, 1)  # (B, heads, T, S, S')
        weights = torch.cat([logits, columns.transpose(2, 3)], -1).softmax(-1)
        direct, region = weights.split([q.shape[3], q.shape[2]], -1)
        if recording():
            note(axial_effective(direct, region, share), lambda: global_tokens(q.shape[2] * q.shape[3], x.device))
        out = direct @ v + (region.transpose(2, 3) @ mean.transpose(2, 3)).transpose(2, 3)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2)).view(x.shape)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 6 N C^2 for the layers, N (3 T + 2 S) C for the rows and the columns."""
        tokens, length = prod(grid), grid[-1]
        return 6 * tokens * site.dim**2 + tokens * (3 * length + 2 * (tokens // length)) * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def axial_effective(direct: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """A (B, heads, N, N): tokens (.., S, T, T'), rows (.., S, T, S'), and what rows are made of (.., S', T, T')."""
    whole = region[..., None] * share.transpose(2, 3)[:, :, None]  # (B, heads, S, T, S', T')
    own = torch.eye(region.shape[2], dtype=direct.dtype, device=direct.device)[:, None, :, None]
    return (whole + direct[..., None, :] * own).flatten(-2).flatten(2, 3)
