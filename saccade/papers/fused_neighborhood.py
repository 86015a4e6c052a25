"""Fused neighborhood attention: windows of any side, dilated, strided, causal, one setting an axis, in 1, 2 and 3-D.

Neighborhood attention, out_i = softmax over j in N(i) of (q_i . k_j / sqrt(d)) v_j, becomes a product of its axes: each
has its own window, dilation, stride (queries of a group share the window of one of them, so that tiles see the same
keys) and may be causal (time in a video, beside free space). Weights never exist as a whole: a tile of near queries
fetches its keys once and attends to them under a mask, in one fused call (`ops.neighborhood`).

Hassani, Hwu, Shi, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
2024, sections 2-4; the stride is of its later code.

Any grid: an axis under kernel x dilation is zero-padded to it at its end, before qkv, as in NAT's authors' modules. No
relative bias: the fused kernels have none (for one with bias, see nat.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.neighborhood import neighborhood_attention
from saccade.ops.sizes import larger
from saccade.ops.window import crop, pad_end
from saccade.parts.attention import check_heads

CARD = Card(
    "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    authors="Hassani, Hwu, Shi",
    year=2024,
    systems=("fused_neighborhood",),
    arxiv="2403.04690",
    code="SHI-Labs/NATTEN@8c8729f",
    licence="MIT",
    read="paper",
    keywords="fused neighborhood attention, causal, strided, dilated, sliding window, 1D 2D 3D, video",
    kinds=("mixer",),
    mixers={"fused_neighborhood": "FusedNeighborhood"},
    goldens=("op_na1d_causal", "op_na1d_even", "op_na1d_strided", "op_na2d_even_dilated", "op_na2d_semi_causal",
             "op_na3d", "op_na3d_causal_time_strided"),
)


class FusedNeighborhood(nn.Module):
    """out = proj(neighborhood attention of qkv(x)): (B, *grid, C) -> (B, *grid, C).

    `kernel`, `dilation`, `stride`, `causal`: one value, or one an axis. Raises SaccadeError where the heads do not
    divide the width or a stride is over its kernel.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset, in the neighbourhood", "softmax", "sum of v")

    def __init__(
        self,
        site: Site,
        kernel: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        each = [(value,) * site.rank if isinstance(value, int) else tuple(value) for value in (kernel, dilation)]
        self.kernel, self.dilation, self.stride, self.causal = *each, stride, causal
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        missing = [larger(0, least - side) for least, side in zip(self._least(), grid, strict=True)]
        q, k, v = self.qkv(pad_end(x, missing)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out = neighborhood_attention(q, k, v, self.kernel, self.dilation, stride=self.stride, causal=self.causal)
        return self.proj(crop(out.flatten(-2), grid))

    def _least(self) -> list[int]:
        """The shortest side of each axis that holds a window."""
        return [side * step for side, step in zip(self.kernel, self.dilation, strict=True)]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: projections 4 N C^2 (3 of the 4 on the padded grid), products 2 N |kernel| C."""
        tokens = torch.Size(grid).numel()
        padded = torch.Size(max(pair) for pair in zip(self._least(), grid, strict=True)).numel()
        return (3 * padded + tokens) * site.dim**2 + 2 * padded * torch.Size(self.kernel).numel() * site.dim

    def reach(self, site: Site) -> tuple[int, ...]:
        """A corner token sees kernel - 1 steps, and so does the first or last of a group."""
        return tuple((side - 1) * step for side, step in zip(self.kernel, self.dilation, strict=True))
