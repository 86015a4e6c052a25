"""ContMix, OverLoCK's dynamic convolution, which stands in other networks too."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.neighborhood_sum import neighborhood_bias, neighborhood_sum, neighbours
from saccade.ops.pooling import adaptive_mean
from saccade.ops.sizes import larger, smaller
from saccade.parts.norm import BatchNorm
from saccade.parts.position import resample

SUMMARY = 7  # cells of the context's summary along an axis


def linear_norm(dim: int, out_dim: int) -> nn.Sequential:
    """A 1x1 convolution (a linear layer on grids) without bias and a batch norm."""
    return nn.Sequential(nn.Linear(dim, out_dim, bias=False), BatchNorm(out_dim))


class ContMix(nn.Module):
    """Dynamic convolution by affinity to a summary of the context: (B, *grid, C) -> (B, *grid, C).

    Alone, queries, context and values are projections of x; with `context` channels a `guide` (B, *grid, C + context)
    gives queries and context, and x itself is the value. (Lou and Yu, OverLoCK, 2025.)
    """

    ranks, weights = (1, 2, 3), True
    template = Template(
        "q k^T of a token and pooled context, turned into a kernel", "softmax over the kernel", "convolution of v"
    )
    undecayed = ("biases.0", "biases.1")

    def __init__(self, site: Site, kernel: int = 7, small: int = 5, context: int | None = None) -> None:
        super().__init__()
        self.heads, self.kernels, self.context = 2 * site.heads, (small, kernel), context
        half = site.dim // 2
        if site.dim % 2 or half % self.heads:
            raise SaccadeError(f"contmix: {self.heads} kernels (2 a head) do not divide half of {site.dim} channels")
        self.scale = (site.dim // self.heads) ** -0.5
        self.query = linear_norm(site.dim, half)
        self.key = linear_norm(context or site.dim, half)
        self.value = nn.Identity() if context else linear_norm(site.dim, site.dim)
        self.kernel_proj = nn.Linear(SUMMARY**site.rank, sum(side**site.rank for side in self.kernels))
        self.biases = nn.ParameterList(torch.zeros(self.heads, *[2 * side - 1] * site.rank) for side in self.kernels)
        self.proj = linear_norm(site.dim, site.dim)
        for bias in self.biases:
            nn.init.trunc_normal_(bias, std=0.02)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        given = tuple(x.shape[1:-1])
        grid = enlarged(given, max(self.kernels))
        same = all(isinstance(side, int) for side in given) and grid == given
        if not same:
            x = resample(x, grid, linear=True)
            guide = None if guide is None else resample(guide, grid, linear=True)
        asking, context = (x, x) if guide is None else guide.split((x.shape[-1], guide.shape[-1] - x.shape[-1]), -1)
        summary = self.key(adaptive_mean(context, (SUMMARY,) * len(grid))).flatten(1, -2)
        logits = self.logits((self.query(asking) * self.scale).flatten(1, -2), summary).unflatten(2, grid)
        halves = self.value(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        parts = logits.split([side ** len(grid) for side in self.kernels], -1)
        mixed = []
        for part, value, kernel, bias in zip(parts, halves, self.kernels, self.biases, strict=True):
            weights = (part + neighborhood_bias(bias, grid, kernel)).softmax(-1)
            if recording():
                mixed.append(written_out(weights, value, kernel, placed=same))
            else:
                mixed.append(neighborhood_sum(weights, value, kernel))
        out = torch.cat([part.flatten(-2) for part in mixed], -1)
        return self.proj(out if same else adaptive_mean(out, given).contiguous())

    def logits(self, query: Tensor, summary: Tensor) -> Tensor:
        """(B, N, C / 2) and (B, M, C / 2) -> (B, h, N, kernel entries), W (q k^T) + b."""
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, summary))
        if recording():  # in the authors' order
            return self.kernel_proj(q @ k.mT)
        return q @ (self.kernel_proj.weight @ k).mT + self.kernel_proj.bias  # W k is small

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C^2 (1/2 + 1 + 1 for own values) for projections, N C M / 2 for the affinity to M cells,
        N h M K for K kernel entries, N C K / 2 for the convolution, M C' C / 2 for the keys.
        """
        tokens = torch.Size(enlarged(grid, max(self.kernels))).numel()
        cells, entries = SUMMARY**site.rank, sum(side**site.rank for side in self.kernels)
        queries = tokens * site.dim**2 // 2 + (0 if self.context else tokens * site.dim**2)
        keys = cells * (self.context or site.dim) * site.dim // 2
        kernels = tokens * cells * (site.dim // 2 + self.heads * entries)
        return (queries + keys + kernels + tokens * site.dim // 2 * entries
                + torch.Size(grid).numel() * site.dim**2)

    def reach(self, site: Site) -> None:
        """Through the summary, every token reaches every other."""
        return None


def enlarged(grid: tuple[int, ...], kernel: int) -> tuple[int, ...]:
    """The grid scaled until its shortest side is no shorter than the kernel."""
    if all(isinstance(side, int) for side in grid):
        least = min(grid)
        return grid if least >= kernel else tuple(kernel if side == least else int(kernel / least * side)
                                                  for side in grid)
    sides: Any = grid
    short = reduce(smaller, sides)
    return tuple(side * larger(short, kernel) // short for side in sides)


def written_out(weights: Tensor, values: Tensor, kernel: int, placed: bool) -> Tensor:
    """`neighborhood_sum` with every neighbourhood copied, its weights noted."""
    B, h, *grid, entries = weights.shape
    tokens = torch.zeros(1, dtype=torch.long, device=weights.device)
    for side in grid:  # (N, k^n) numbers of the neighbours
        tokens = tokens.view(-1, 1, tokens.shape[-1], 1) * side
        tokens = (tokens + neighbours(side, kernel, weights.device)[:, None]).flatten(2).flatten(0, 1)
    count = torch.Size(grid).numel()
    rows = weights.flatten(2, -2)
    queries = torch.arange(count, device=weights.device)[:, None]
    note(rows.transpose(1, 2).reshape(B * count, h, 1, entries), (lambda: (queries, tokens)) if placed else None)
    copies = values.flatten(1, -3)[:, tokens]  # (B, N, k^n, h, d)
    return torch.einsum("bhnk,bnkhd->bnhd", rows, copies).unflatten(1, tuple(grid))
