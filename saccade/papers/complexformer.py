"""ComplexFormer: every head learns how differences of meaning and of place turn into one angle.

The halves of a head's query and key are real and imaginary parts of d / 2 complex numbers, of size r and angle phi. A
pair of tokens scores by how their numbers point, after each head has stretched the difference of their angles by a
factor delta of its own, moved it by b, and added the turn g of a rotary position,
    s_ij = sum_c r_ic r_jc cos(delta_c (phi_ic - phi_jc) + b_c + (i - j) g_c),
so that delta = 1 and b = 0, where training starts, is rotary attention. The cosine of a difference is a product of two
vectors: turned queries r (cos a, sin a), a = delta phi_i + b + i g, and keys likewise give the same scores, and plain
fused attention does the rest. Written out as it stands, the angles of all pairs would fill N^2 d / 2 numbers a head.

Shao, Huang, Wu, Zhang, Wu, Shan, Zheng, "ComplexFormer: Disruptively Advancing Transformer Inference Ability via
Head-Specific Complex Vector Attention", 2025. Its authors have withdrawn it from arXiv (version 2).

Any grid: tokens are numbered row by row, prefix first.
Quirks kept: scores are not divided by sqrt(d); the turns g = 10000^(-2c / d) are rounded to bfloat16; at angles of pi,
where phi jumps, a delta that is no whole number makes the score jump too.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.tokens import causal, global_tokens, join, split

CARD = Card(
    "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention",
    authors="Shao, Huang, Wu, Zhang, Wu, Shan, Zheng",
    year=2025,
    systems=("complexformer",),
    arxiv="2505.10222",
    code="shaojintian/complexFormer@f91ac74",
    licence="unknown",
    read="abstract",
    keywords="complex multi-head attention, Euler transformation, polar form, adaptive differential rotation, rotary",
    kinds=("mixer",),
    mixers={"complex_attention": "ComplexAttention"},
    goldens=("op_complexformer_attention", "op_complexformer_attention_causal"),
    tests=("tests/papers/test_complexformer.py",),
)

EPS = 1e-9


@table
def turns(count: int, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, pairs) n 10000^(-c / pairs), the rate in bfloat16 as published."""
    rates = (10000.0 ** (-torch.arange(pairs, device=device) / pairs)).bfloat16().to(dtype)
    return torch.arange(count, device=device, dtype=dtype)[:, None] * rates


class ComplexAttention(nn.Module):
    """proj(softmax_j(s_ij) v_j) with complex scores: (B, *grid, C) -> (B, *grid, C).

    `causal` tokens see none that comes after them. Raises SaccadeError where a head has an odd number of channels.
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    projections = ("qkv", "proj")
    undecayed = ("factor", "offset")
    template = Template("sum_c r_i r_j cos(delta (phi_i - phi_j) + b + (i - j) g)", "softmax", "sum of v")

    def __init__(self, site: Site, causal: bool = False) -> None:
        super().__init__()
        if check_heads(site) % 2:
            raise SaccadeError(f"{site.dim // site.heads} channels a head: half are real, half imaginary parts; choose "
                               "heads of an even number")
        self.heads, self.causal = site.heads, causal
        pairs = site.dim // site.heads // 2
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)
        self.factor = nn.Parameter(torch.ones(site.heads, pairs))
        self.offset = nn.Parameter(torch.zeros(site.heads, pairs))
        self.proj = nn.Linear(site.dim, site.dim, bias=False)

    @overload
    def forward(self, x: Tensor, prefix: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = join(x, prefix)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.turned(q, self.offset), self.turned(k)
        count = tokens.shape[1]
        mask = causal(count, x.device, q.dtype) if self.causal else None
        out = attend(q, k, v, mask, scale=1.0, where=lambda: global_tokens(count, x.device))
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)

    def turned(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """r (cos a, sin a) with a = delta phi + n g (+ b) of complex numbers (B, heads, N, d), in their place."""
        real, imaginary = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)  # angles need the digits
        size = (real.square() + imaginary.square() + EPS).sqrt()
        real = real.masked_fill((real == 0) & (imaginary == 0), 1)  # zero has no angle: 0, and no gradient
        angle = self.factor[:, None] * torch.atan2(imaginary, real)
        angle = angle + turns(x.shape[2], self.factor.shape[1], x.device, real.dtype)
        if offset is not None:
            angle = angle + offset[:, None]
        return torch.cat([size * angle.cos(), size * angle.sin()], -1).to(x.dtype)

    def reach(self, site: Site) -> None:
        """Every token reaches every other (every later one, where it is causal)."""
        return None

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products with N tokens."""
        tokens = torch.Size(grid).numel() + prefix
        return 4 * tokens * site.dim**2 + 2 * tokens**2 * site.dim


AUTHORS: KeyMap = (
    *((rf"W_{name}\.(.*)", rf"qkv.\1#{piece}") for piece, name in enumerate("qkv")),
    (r"W_o\.(.*)", r"proj.\1"),
    (r"delta_params", "factor"),
    (r"bias_params", "offset"),
    Dropped(r"g", "follows from the width of a head"),
)
