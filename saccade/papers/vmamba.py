"""VMamba: an image scanned along four ways that cross (SS2D).

A scan orders tokens in a line and neighbours of a picture are not neighbours there. Four sequences of the same map, row
by row, column by column and both from their ends, each with steps, inputs, readouts and decays of its own, bring every
token what lies in each quadrant around it,
    out = out_proj(norm(sum over ways w of back_w(scan_w(u ordered by w))) silu(z)),
where (x, z) = in_proj(tokens) and u = silu(depthwise convolution(x)). A block is x += SS2D(norm(x)), without an MLP.
Projections do not care for the order of tokens: those of all ways are one product; all ways are one scan.

Liu et al., "VMamba: Visual State Space Model", 2024, sections 4.2-4.3 (the first release, with gate and without MLP).

Any grid. Sequences have two ways, volumes six: each axis in turn runs fastest.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.ops.scan import selective_scan
from saccade.parts.convolution import depthwise
from saccade.parts.ssm import log_rates, step_bias, step_rank

CARD = Card(
    "VMamba: Visual State Space Model",
    authors="Liu, Tian, Zhao, Yu, Xie, Wang, Ye, Jiao, Liu",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2401.10166",
    code="MzeroMiko/VMamba@2ed52ea",
    licence="MIT",
    read="paper, code",
    keywords="cross-scan, SS2D, visual state space, selective scan, four directions",
    kinds=("mixer",),
    mixers={"cross_scan": "CrossScan"},
    goldens=("op_ss2d", "op_vss_block"),
    tests=("tests/papers/test_vmamba.py",),
)


class CrossScan(nn.Module):
    """Scans along every axis and from both ends, summed, normed and gated: (B, *grid, C) -> (B, *grid, C).

    `rank` is the width from which the steps are projected (C / 16 unless given), `kernel` the convolution's.
    """

    ranks = (1, 2, 3)
    template = ("in_proj", "out_proj")
    undecayed = ("A_log", "D")

    def __init__(
        self, site: Site, states: int = 16, kernel: int = 3, expand: float = 2, rank: int | None = None,
        bias: bool = False, conv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner, rank = int(expand * site.dim), step_rank(site.dim) if rank is None else rank
        self.ways, self.kernel, self.split = 2 * site.rank, kernel, (rank, states, states)
        self.in_proj = nn.Linear(site.dim, 2 * inner, bias=bias)
        self.conv = depthwise(site.rank, inner, kernel, bias=conv_bias)
        self.x_proj = nn.Linear(inner, self.ways * sum(self.split), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.ways, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_bias = step_bias(self.ways * inner)
        self.A_log = log_rates(self.ways * inner, states)
        self.D = nn.Parameter(torch.ones(self.ways * inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, site.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        inner, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(inner))
        chosen = self.x_proj(u).unflatten(-1, (self.ways, -1))  # (B, *grid, ways, rank + 2 n)
        r, b, c = ordered(chosen, shared=False).split(self.split, -1)
        u = ordered(u.unsqueeze(-2), shared=True)
        bias, skip, rates = (value.unflatten(0, (self.ways, -1)) for value in (self.dt_bias, self.D, self.A_log))
        dt = F.softplus(r @ self.dt_weight.mT + bias.unsqueeze(-2))
        y = selective_scan(u, dt, -rates.exp(), b, c) + u * skip.unsqueeze(-2)
        return self.out_proj(self.norm(put_back(y, grid)).to(gate.dtype) * F.silu(gate))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token: 3 C E for the projections, k^r E for the convolution, (2 rank + 3 n) E for a way."""
        inner, (rank, states, _) = self.dt_weight.shape[1], self.split
        each = 3 * site.dim + self.kernel**site.rank + self.ways * (2 * rank + 3 * states)
        return prod(grid) * inner * each

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def ordered(x: Tensor, shared: bool) -> Tensor:
    """(B, *grid, ways, C) -> (B, ways, N, C): way w's part (the one part, where it is `shared`) in the order of w.

    The last axis runs fastest in the first way, the first axis in the last of the first half; the second half has the
    same orders from their ends.
    """
    rank = x.ndim - 3
    parts = x.unbind(-2) * (2 * rank) if shared else x.unbind(-2)
    lines = [parts[way].movedim(rank - way % rank, -2).flatten(1, -2) for way in range(2 * rank)]
    return torch.stack([*lines[:rank], *(line.flip(1) for line in lines[rank:])], 1)


def put_back(y: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Undo `ordered` and sum over the ways: (B, ways, N, C) -> (B, *grid, C)."""
    rank = len(grid)
    there, back = y.chunk(2, 1)
    both = there + back.flip(2)
    total = both[:, 0].unflatten(1, grid)
    for way in range(1, rank):
        axis = rank - 1 - way
        order = (*grid[:axis], *grid[axis + 1:], grid[axis])
        total = total + both[:, way].unflatten(1, order).movedim(-2, axis + 1)
    return total.contiguous()


AUTHORS: KeyMap = (
    (r"x_proj_weight", "x_proj.weight", lambda weight: weight.flatten(0, 1)),
    (r"dt_projs_weight", "dt_weight"),
    (r"dt_projs_bias", "dt_bias", Tensor.flatten),
    (r"A_logs", "A_log"),
    (r"Ds", "D"),
    (r"conv2d\.(.*)", r"conv.\1"),
    (r"out_norm\.(.*)", r"norm.\1"),
)
