"""PPMA: attention that fades along the bent path between two tokens, by steps that the tokens choose.

Each token gives a head two step lengths, alpha along its row and beta along its column, both negative. A path goes
along the row of the query, then along the column of the key; what it has cost is added to the logits,
    M[(y, x), (y', x')] = -|a[y, x] - a[y, x']| - |b[y, x'] - b[y', x']|,
a and b the running sums of alpha along rows and of beta along columns. Full attention averages the weights under M and
under its transpose (the path that bends at the other corner). Early stages take the axes apart: rows then columns, and
columns then rows, averaged. Only the masks of single lines are ever built, (H W^2 + W H^2) numbers a head for the N^2
of the path mask.

Zhao et al., "Polyline Path Masked Attention for Vision Transformer", 2025, sections 3.2-3.4.

Any grid, without padding. Quirks kept: the layout and the rotation of RMT; the projection to step lengths is shared by
the heads, each of which reads its own channels of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, Rule
from saccade.core.record import note
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import affinity
from saccade.ops.rotary import rotate
from saccade.parts.attention import check_heads
from saccade.parts.axes import line_tokens
from saccade.parts.convolution import depthwise
from saccade.parts.pyramid import Pyramid
from saccade.parts.rmt_pyramid import RmtPyramid, rmt_names
from saccade.parts.tokens import global_tokens

_PUBLISHED = ("ppma_t", "ppma_s", "ppma_b")

CARD = Card(
    "Polyline Path Masked Attention for Vision Transformer",
    authors="Zhao, Ding, Zheng, Fu, Meng",
    year=2025,
    systems=("ppma",),
    arxiv="2506.15940",
    code="zhongchenzhao/PPMA@eb6491e",
    licence="Apache-2.0",
    read="paper, code",
    keywords="polyline path mask, structured mask, Mamba2, decay, data-dependent, axial decomposition",
    kinds=("backbone", "mixer"),
    mixers={"polyline_path": "PolylinePath"},
    params=dict(zip(_PUBLISHED, (14e6, 27e6, 54e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (2.7e9, 4.9e9, 10.6e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (82.6, 84.2, 85.0), strict=True)),
    weights={
        f"ppma_{size.lower()}": Weights("hf:ZhongchenZhao/PPMA/checkpoints/"
                                        f"classification/PPMA_{size}_{run}/best.pth")
        for size, run in (("T", "202502251000"), ("S", "202504021000"), ("B", "202504101400"))
    },
    goldens=("ppma_t", "op_ppma_decomposed", "op_ppma_full", "op_ppma_path_mask"),
)

Grid = tuple[int, ...]


class PolylinePath(nn.Module):
    """out = proj(A v + conv(v)): A softmax attention under the path masks, its axes apart where `decomposed`."""

    ranks, weights = (2,), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d), times decays along the paths from i to j",
        "softmax, then the mask",
        "sum of v, and a convolution of v",
    )
    undecayed = ("step_bias", "log_rate")

    def __init__(self, site: Site, decomposed: bool = True) -> None:
        super().__init__()
        if check_heads(site) % 2:
            raise SaccadeError(f"{site.heads} heads of {site.dim} channels: rotation takes pairs, so give even heads")
        if site.rank != 2:
            raise SaccadeError(f"a path mask on a grid of {site.rank} axes: give rows and columns")
        self.heads, self.decomposed = site.heads, decomposed
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.local = depthwise(site.rank, site.dim, 5)
        self.proj = nn.Linear(site.dim, site.dim)
        self.steps = nn.Linear(site.dim // site.heads, 2, bias=False)
        length = torch.exp(torch.empty(site.heads).uniform_(log(0.001), log(0.1)))
        self.step_bias = nn.Parameter(length + torch.log(-torch.expm1(-length)))  # softplus of it is `length`
        self.log_rate = nn.Parameter(torch.empty(site.heads).uniform_(1, 1.1).log())

    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The masks along rows (B, H, heads, W, W) and along columns (B, W, heads, H, H)."""
        steps = self.steps(x.unflatten(-1, (self.heads, -1))) + self.step_bias[:, None]
        alpha, beta = (F.softplus(steps) * -self.log_rate.exp()[:, None]).unbind(-1)  # (B, H, W, heads)
        return line_mask(alpha.transpose(2, 3)), line_mask(beta.permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        parts = qkv.unflatten(-1, (3, self.heads, -1))  # (B, H, W, 3, heads, d)
        q, k = rotate(parts[..., :2, :, :]).unbind(-3)
        v = parts[..., 2, :, :]
        mixed = (self.apart if self.decomposed else self.whole)(q, k, v, *self.masks(x))
        return self.proj(self.local(qkv.chunk(3, -1)[2]) + mixed.reshape(x.shape))

    def apart(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Rows then columns and columns then rows, averaged, (B, H, W, heads, d): the weights of a line serve twice."""
        grid = tuple(q.shape[1:3])

        def where(axis: int) -> Any:
            return lambda: (line_tokens(grid, (axis,), q.device),) * 2

        def weights(mask: Tensor, axis: int, order: tuple[int, ...]) -> Tensor:
            lines_q, lines_k = (part.permute(order).flatten(0, 1) for part in (q, k))
            return affinity(lines_q, lines_k, mask.flatten(0, 1), where=where(axis)).unflatten(0, mask.shape[:2])

        in_row, in_column = weights(rows, 1, (0, 1, 3, 2, 4)), weights(columns, 0, (0, 2, 3, 1, 4))
        by_row, by_column = v.permute(0, 1, 3, 2, 4), v.permute(0, 2, 3, 1, 4)  # (B, line, heads, N, d)
        turned = (0, 3, 2, 1, 4)
        first = in_column @ (in_row @ by_row).permute(turned)
        second = in_row @ (in_column @ by_column).permute(turned)
        return (first.permute(0, 3, 1, 2, 4) + second.permute(0, 1, 3, 2, 4)) / 2

    def whole(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Attention of all tokens to all: the mean of the weights under both paths, (B, H, W, heads, d)."""
        H, W = q.shape[1:3]
        q, k, v = (part.flatten(1, 2).transpose(1, 2) for part in (q, k, v))
        logits, mask = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), path_mask(rows, columns)
        # A path that bends at the key's column, and one that bends at the query's: there and back.
        weights = ((logits + mask).softmax(-1) + (logits + mask.transpose(-2, -1)).softmax(-1)) / 2
        note(weights, lambda: global_tokens(H * W, q.device))
        return (weights @ v).transpose(1, 2).unflatten(1, (H, W))

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds of N tokens: projections 4 N C^2 + 2 N C, convolution 25 N C, attention 2 N^2 C, in the
        decomposed form 3 N (H + W) C (the products with values twice an axis).
        """
        keys = 3 * sum(grid) if self.decomposed else 2 * prod(grid)
        return prod(grid) * site.dim * (4 * site.dim + 2 + 25 + keys)


def line_mask(steps: Tensor) -> Tensor:
    """-|c_i - c_j| with the running sums c of negative steps: (..., N) -> (..., N, N)."""
    sums = steps.cumsum(-1)
    further = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return torch.minimum(further, -further)


def path_mask(rows: Tensor, columns: Tensor) -> Tensor:
    """The whole mask M (B, heads, N, N), query by key, of paths along the query's row, then the key's column."""
    mask = rows.transpose(1, 2).unsqueeze(4) + columns.permute(0, 2, 3, 4, 1).unsqueeze(3)
    return mask.flatten(4).flatten(2, 3)


SIZES: dict[str, dict[str, Any]] = {
    "ppma_t": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), heads=(4, 4, 8, 16),
                   decomposed=(True, True, False, False)),
    "ppma_s": dict(dims=(64, 128, 256, 512), depths=(3, 4, 18, 4), heads=(4, 4, 8, 16), ratios=(4, 4, 3, 3)),
    "ppma_b": dict(dims=(80, 160, 320, 512), depths=(4, 8, 25, 8), heads=(5, 5, 10, 16), ratios=(4, 4, 3, 3),
                   layer_scales=(None, None, 1e-6, 1e-6)),
    "ppma_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(2, 4, 8), decomposed=(True, True, False),
                      projection=128, patch=2, img_size=32),
}


def ppma(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float] = (3, 3, 3, 3),
    decomposed: Sequence[bool] = (True, True, True, False),
    layer_scales: Sequence[float | None] = (None, None, None, None),
    projection: int = 1024,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A PPMA of a size, in RMT's layout; the sequences have one entry a stage."""
    mixers = [partial(PolylinePath, decomposed=apart) for apart in decomposed]
    return RmtPyramid(dims, depths, heads, mixers, ratios, layer_scales, projection, patch, replace=mixer, **common)


PATH: list[Rule] = [
    (r"dt_bias", "step_bias"),
    (r"A_log", "log_rate"),
    (r"dt_linear\.(.*)", r"steps.\1"),
]
MIXER: KeyMap = (
    *((rf"{letter}_proj\.(.*)", rf"qkv.\1#{part}") for part, letter in enumerate("qkv")),
    (r"lepe\.conv\.(.*)", r"local.\1"),
    (r"out_proj\.(.*)", r"proj.\1"),
    *((r"path_embed\." + rule[0], rule[1]) for rule in PATH),
)
AUTHORS: KeyMap = rmt_names(MIXER)
# The authors' stage outputs are taken after the downsampling that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
