"""Mamba: a state space layer whose steps, inputs and readouts depend on the token (S6).

Each channel keeps n numbers of state. The token says how long the step is (dt: 0 ignores the token and keeps the state,
large forgets and takes it in), what enters (b) and what is read (c),
    h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t,    y_t = c_t . h_t + D u_t,    out = out_proj(y silu(z)),
where (x, z) = in_proj(tokens) and u = silu(causal convolution(x)). Cost is linear in the tokens, the state is all that
the past leaves. `ops.scan` runs the recurrence in parallel chunks.

Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, sections 3.1-3.4.

Any grid: tokens are taken in row-major order; a token sees those before it.
Quirks kept: b enters with dt b (Euler), only the decay is discretised exactly.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.ssm import Selection, selection_names, step_rank

CARD = Card(
    "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    authors="Gu, Dao",
    year=2023,
    systems=("survey_ssm_medical",),
    arxiv="2312.00752",
    code="state-spaces/mamba@e9594ce",
    licence="Apache-2.0",
    read="paper, code",
    keywords="selective state space model, S6, selective scan, linear time, causal",
    kinds=("mixer",),
    mixers={"mamba": "Mamba"},
    goldens=("op_mamba_mixer",),
    tests=("tests/ops/test_scan.py",),
)


class Mamba(nn.Module):
    """out_proj(selection(x) silu(z)), (x, z) = in_proj(tokens): (B, *grid, C) -> (B, *grid, C), inner width `expand` C.

    `rank` is the width from which the steps are projected (C / 16 unless given).
    """

    ranks = (1, 2, 3)
    projections = ("in_proj", "out_proj")
    template = Template("selective scan: C_i A_(i..j) B_j, j <= i", "decays A in (0, 1)", "sum of x, gated")

    def __init__(
        self, site: Site, states: int = 16, kernel: int = 4, expand: float = 2, rank: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * site.dim)
        self.in_proj = nn.Linear(site.dim, 2 * inner, bias=bias)
        self.selection = Selection(inner, step_rank(site.dim) if rank is None else rank, states, kernel)
        self.out_proj = nn.Linear(inner, site.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens, gate = self.in_proj(x.flatten(1, -2)).chunk(2, -1)
        return self.out_proj(self.selection(tokens) * F.silu(gate)).view(x.shape)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 3 N C E for the projections around a selection of width E."""
        return prod(grid) * 3 * self.out_proj.weight.numel() + self.selection.cost(prod(grid))

    def reach(self, site: Site) -> None:
        """A token reaches every later one."""
        return None


AUTHORS: KeyMap = selection_names("", "selection")
