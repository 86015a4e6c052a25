"""Kernelized attention with relative positions, in N log N.

Random features make the softmax a product, exp(q . k) = E phi(q) . phi(k); relative positions weigh it by a Toeplitz
matrix, and a product with one is a convolution, which Fourier transforms compute:
    out_i = phi(q_i) . (sum_j c[j - i] phi(k_j) v_j) / phi(q_i) . (sum_j c[j - i] phi(k_j)),    c = exp(b),
    phi(x) = exp(w x - |x|^2 / 2),   w drawn once from a normal distribution, a row a feature.
The error of the features grows exponentially with |q| and |k|: with q and k of length one it is small, attention can be
trained from the start, and b gives back what the lengths could say.

Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu, "Stable, Fast and Accurate: Kernelized Attention with Relative Positional
Encoding", 2021, sections 3 and 4.

Any grid: an offset an axis; a smaller grid takes the offsets that it has, and offsets beyond the native grid take the
entry of the farthest. Small maps are computed pair by pair, which is the same and faster there.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.toeplitz import WHOLE, at_offsets, by_queries, toeplitz, toeplitz_product
from saccade.parts.attention import check_heads
from saccade.parts.tokens import global_tokens

PAIRS = 1500  # times 2^rank, for padding: tokens up to which pairs are faster than transforms (measured on a CPU)

CARD = Card(
    "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
    authors="Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu",
    year=2021,
    systems=("kernelized_rpe",),
    arxiv="2106.12566",
    keywords="kernelized attention, linear attention, relative position, Toeplitz matrix, FFT, random features, NPRF",
    kinds=("mixer",),
    mixers={"kernelized_relative_attention": "KernelizedRelative"},
    tests=("tests/papers/test_kernelized_rpe.py",),
)


class KernelizedRelative(nn.Module):
    """Attention by `features` positive random features a head, weighed by exp(b[j - i]): (B, *grid, C) -> the same.

    `normalise` gives queries and keys the length `scale`; without it they are divided by d^(1/4), as softmax attention
    does. `relative` False leaves b out, `causal` (sequences only) what comes after a token. `method` is "fft", "pairs"
    or, by the number of tokens, "auto". Raises SaccadeError for another method and for causal grids.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("phi(q) phi(k)^T exp(b[j - i]), phi random features", "divided by its sum", "sum of v")
    undecayed = ("bias",)
    directions: Tensor

    def __init__(
        self, site: Site, features: int | None = None, normalise: bool = True, scale: float = 1.0,
        relative: bool = True, causal: bool = False, method: str = "auto",
    ) -> None:
        super().__init__()
        width = check_heads(site)
        if method not in ("auto", "fft", "pairs"):
            raise SaccadeError(f'method={method!r}: choose "auto", "fft" or "pairs"')
        if causal and site.rank > 1:
            raise SaccadeError(f"causal=True needs a sequence, and the grid {site.grid} has {site.rank} axes")
        self.heads, self.normalise, self.scale, self.causal, self.method = site.heads, normalise, scale, causal, method
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.bias = nn.Parameter(torch.zeros(site.heads, *(2 * side - 1 for side in site.grid))) if relative else None
        self.register_buffer("directions", orthogonal(width if features is None else features, width))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, factor = self.features(q, query=True), self.features(k, query=False), self.factor(grid)
        free = not all(isinstance(side, int) for side in x.shape)  # sizes that export leaves open cannot choose
        if recording():
            weights = (q @ k.mT) * toeplitz(factor, grid)
            weights = weights / weights.sum(-1, keepdim=True)
            note(weights, lambda: global_tokens(q.shape[-2], x.device))
            out = weights @ v
        elif self.method == "fft" or free or (self.method == "auto" and q.shape[-2] > PAIRS * 2 ** len(grid)):
            out = by_transform(q, k, v, factor, grid)
        else:
            out = by_pairs(q, k, v, factor, grid)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def features(self, x: Tensor, query: bool) -> Tensor:
        """(B, heads, N, d) -> (B, heads, N, m) up to a factor that cancels: one a query, one for all keys."""
        if self.normalise:
            logits = F.normalize(x, dim=-1) * self.scale @ self.directions.T
        else:
            x = x * x.shape[-1] ** -0.25
            logits = x @ self.directions.T - x.square().sum(-1, keepdim=True) / 2
        return (logits - logits.detach().amax((-1,) if query else (-2, -1), keepdim=True)).exp()

    def factor(self, grid: tuple[int, ...]) -> Tensor:
        """c (heads, *(2 side - 1)), its largest 1."""
        if self.bias is None:
            c = self.qkv.weight.new_ones(self.heads, *(2 * side - 1 for side in grid))
        else:
            bias = at_offsets(self.bias, grid)
            c = (bias - bias.detach().amax(tuple(range(1, bias.ndim)), keepdim=True)).exp()
        if self.causal:
            c = torch.cat([c.narrow(1, 0, grid[0]), torch.zeros_like(c.narrow(1, 0, grid[0] - 1))], 1)
        return c

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The bias of another native grid: the entries of this one's offsets."""
        if parameter != "bias" or self.bias is None or value.ndim != self.bias.ndim:
            return value
        return at_offsets(value, tuple((side + 1) // 2 for side in self.bias.shape[1:]))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds pair by pair: 4 N C^2 for the projections, 2 N C m for the features, N^2 heads (m + d).

        Fourier transforms, which count none, take the place of the last at many tokens.
        """
        tokens, features = prod(grid), self.directions.shape[0]
        pairs = tokens**2 * (self.heads * features + site.dim)
        return 4 * tokens * site.dim**2 + 2 * tokens * site.dim * features + pairs

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def orthogonal(features: int, width: int) -> Tensor:
    """(features, width) rows of a normal distribution, orthogonal to each other in blocks of `width`."""
    blocks = [torch.linalg.qr(torch.randn(width, width)).Q for _ in range(-(-features // width))]
    return torch.cat(blocks)[:features] * torch.randn(features, width).norm(dim=-1, keepdim=True)


def by_pairs(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, grid: tuple[int, ...]) -> Tensor:
    """All weights, some queries at a time where no gradient is taken: q, k (B, heads, N, m), v (B, heads, N, d)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        weights = (q @ k.mT) * toeplitz(factor, grid)
        return weights @ v / weights.sum(-1, keepdim=True)
    heads = []
    for head in range(q.shape[1]):
        pieces = []
        for queries, part in by_queries(grid, q.shape[0]):
            weights = (q[:, head, queries] @ k[:, head].mT).mul_(toeplitz(factor[head:head + 1, part], grid))
            pieces.append((weights @ v[:, head]).div_(weights.sum(-1, keepdim=True)))
        heads.append(torch.cat(pieces, 1))
    return torch.stack(heads, 1)


def by_transform(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The sums over keys by Fourier transforms, some features at a time."""
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1).mT  # (B, heads, d + 1, N)
    known = all(isinstance(side, int) for side in v.shape)
    step = max(1, WHOLE // (prod(values.shape) * 2 ** len(grid))) if known else 1
    total = torch.zeros_like(values)
    for first in range(0, q.shape[-1], step):
        keys, queries = (each[..., first:first + step].mT[:, :, :, None] for each in (k, q))  # (B, heads, step, 1, N)
        sums = toeplitz_product(factor, (keys * values[:, :, None]).unflatten(-1, grid))
        total = total + (queries * sums.flatten(-len(grid))).sum(2)
    out, norm = total.mT.split([v.shape[-1], 1], -1)
    return out / norm.clamp(min=torch.finfo(norm.dtype).tiny)
