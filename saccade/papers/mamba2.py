"""Mamba-2: a state space layer that is a masked attention, computed in matrices (SSD).

All channels of a head decay alike, so the state of a head is a matrix and the scan a product,
    H_t = exp(dt_t a) H_{t-1} + dt_t b_t x_t^T,    y_t = H_t^T c_t + D x_t    <=>    Y = (M o (C B^T)) (dt X) + D X,
with M_ij the decay between the two tokens, 0 where j comes after i: linear attention under a mask that forgets. Inside
chunks the matrix form is used, between them the state passes on (`ops.scan.ssd`). One projection gives all,
    (z, x, b, c, dt) = in_proj(tokens),    out = out_proj(rms_norm(y silu(z))),
with x, b and c through one causal convolution and SiLU.

Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
2024, sections 5-7.

Any grid: tokens are taken in row-major order; a token sees those before it.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.scan import ssd
from saccade.parts.ssm import CausalConv, RMSNorm, step_bias

CARD = Card(
    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    authors="Dao, Gu",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2405.21060",
    code="state-spaces/mamba@e9594ce",
    licence="Apache-2.0",
    read="paper",
    keywords="state space duality, SSD, Mamba-2, masked linear attention, chunked scan",
    kinds=("mixer",),
    mixers={"mamba2": "Mamba2"},
    goldens=("op_mamba2_mixer",),
    tests=("tests/ops/test_scan.py",),
)


class Mamba2(nn.Module):
    """out_proj(norm(ssd(x) silu(z))): (B, *grid, C) -> (B, *grid, C), inner width `expand` C.

    Heads have `width` channels, halved until they are whole and no fewer than the site's heads; `groups` of heads share
    b and c. Raises SaccadeError where they do not divide the heads.
    """

    ranks = (1, 2, 3)
    projections = ("in_proj", "out_proj")
    template = Template("state space dual: C_i B_j^T a_(i..j), j <= i", "decays a in (0, 1)", "sum of x, gated, normed")
    undecayed = ("A_log", "D")

    def __init__(
        self, site: Site, states: int = 64, width: int = 64, kernel: int = 4, expand: float = 2, groups: int = 1
    ) -> None:
        super().__init__()
        inner = int(expand * site.dim)
        while width > 1 and (inner % width or inner // width < site.heads):
            width //= 2
        heads = inner // width
        if heads % groups:
            raise SaccadeError(f"mamba2: groups={groups} does not divide the {heads} heads of {width} channels")
        self.groups, self.split = groups, (inner, inner + 2 * groups * states, heads)
        self.in_proj = nn.Linear(site.dim, sum(self.split), bias=False)
        self.conv = CausalConv(self.split[1], kernel)
        self.dt_bias = step_bias(heads)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, site.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, inputs, steps = self.in_proj(x.flatten(1, -2)).split(self.split, -1)
        inner, heads = self.split[0], self.split[2]
        both = (self.split[1] - inner) // 2
        tokens, b, c = F.silu(self.conv(inputs)).split((inner, both, both), -1)
        tokens = tokens.unflatten(-1, (heads, -1))
        b, c = b.unflatten(-1, (self.groups, -1)), c.unflatten(-1, (self.groups, -1))
        y = ssd(tokens, F.softplus(steps + self.dt_bias), -self.A_log.exp(), b, c) + self.D.unsqueeze(-1) * tokens
        return self.out_proj(self.norm(y.flatten(-2).to(gate.dtype) * F.silu(gate))).view(x.shape)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds a token: projections, convolution, and n E to read the states of the recurrence."""
        inner, convolved, _ = self.split
        states = (convolved - inner) // (2 * self.groups)
        each = self.in_proj.weight.numel() + self.conv.weight.numel() + inner * (states + site.dim)
        return prod(grid) * each

    def reach(self, site: Site) -> None:
        """A token reaches every later one."""
        return None


AUTHORS: KeyMap = ((r"conv1d\.(.*)", r"conv.\1"),)
