"""GAAM: every number is weighed by how it stands to the others, by a learned Gaussian.

Along an axis (the tokens of a channel, or the channels of a token), cut into one piece a head,
    out = x w,   w_i = p_i / sum_j p_j,   p_i = prod_g N((x_i - mean - offset_g) / std; 0, c_g),
with mean and standard deviation of the piece and a learned offset and width c of each Gaussian g: parameters in tens,
and arithmetic that grows with the map alone. A product of Gaussians is a Gaussian, so one exponential serves for all.

Ioannides, Chadha, Elkins, "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across
Multiple Modalities", 2024, section 3.

Any grid: tokens are taken in row-major order; where they are fewer than the heads the last head has them all.
Quirks kept: the last piece takes the remainder; the variance is the unbiased one (0 of a single number, where the
authors' code gives none); the sum over j is at least 1e-8 whatever the caller's epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import Affinity, note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import larger

EPS = 1e-8
AXES = {"tokens": 1, "channels": 2}  # of (B, N, C)

CARD = Card(
    "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
    authors="Ioannides, Chadha, Elkins",
    year=2024,
    systems=("gaam",),
    arxiv="2401.11143",
    code="gioannides/Gaussian-Adaptive-Attention@145d1bc",
    licence="Apache-2.0",
    read="paper, code",
    keywords="Gaussian adaptive attention, mixture of Gaussians, feature recalibration, importance factor",
    kinds=("mixer",),
    mixers={"gaussian_adaptive_attention": "GaussianAdaptive"},
    goldens=("gaussian_block", "op_gaussian_adaptive_attention"),
    tests=("tests/papers/test_gaam.py",),
)


class GaussianAdaptive(nn.Module):
    """x w, w the normalised density of each number among those of its piece of `axis`: (B, *grid, C) -> the same.

    `axis` is "tokens" or "channels"; a piece for each of `heads` (the site's own by default), `gaussians` in each.
    Raises SaccadeError for another axis, and where there are fewer channels than heads.
    """

    ranks = (1, 2, 3)
    template = Template("Gaussian of x_i about the mean of all", "density, divided by their sum", "x_i times it")

    def __init__(self, site: Site, gaussians: int = 3, axis: str = "tokens", heads: int | None = None) -> None:
        super().__init__()
        self.heads = site.heads if heads is None else heads
        if axis not in AXES:
            raise SaccadeError(f"axis={axis!r}: choose one of {', '.join(AXES)}")
        if axis == "channels" and self.heads > site.dim:
            raise SaccadeError(f"{self.heads} heads share {site.dim} channels: choose at most so many heads")
        self.axis = axis
        self.offset = nn.Parameter(torch.zeros(self.heads, gaussians))
        self.width = nn.Parameter(torch.randn(self.heads, gaussians).exp())

    def forward(self, x: Tensor) -> Tensor:
        tokens, axis = x.flatten(1, -2), AXES[self.axis]
        weights = [self.weigh(piece, head, axis) for head, piece in enumerate(self.pieces(tokens, axis))
                   if not (isinstance(piece.shape[axis], int) and piece.shape[axis] == 0)]
        joined = torch.cat(weights, axis)
        if recording():
            note(joined.transpose(1, 2)[:, :, None])
        return (tokens * joined).view(x.shape)

    def pieces(self, tokens: Tensor, axis: int) -> list[Tensor]:
        """One a head along an axis; the last takes what is over."""
        whole = tokens.shape[axis]
        length = whole // self.heads
        last = (self.heads - 1) * length
        return [*(tokens.narrow(axis, head * length, length) for head in range(self.heads - 1)),
                tokens.narrow(axis, last, whole - last)]

    def weigh(self, x: Tensor, head: int, axis: int) -> Tensor:
        """The weights of a piece: those of the one Gaussian that the product of all is, up to a factor `shared`."""
        steepness = 0.5 / self.width[head].square()
        total = steepness.sum()
        middle = (steepness * self.offset[head]).sum() / total
        apart = (steepness * (self.offset[head] - middle).square()).sum()
        step = x - x.mean(axis, keepdim=True)
        others = larger(x.shape[axis] - 1, 1)
        variance = step.square().sum(axis, keepdim=True) / others + EPS
        density = -total / variance * (step - middle).square()
        shared = 0.5 * (2 * pi * self.width[head].square()).log().sum() + apart / variance
        return (density - torch.maximum(density.logsumexp(axis, keepdim=True), shared + log(EPS))).exp()

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """No matrix product: arithmetic on each number by itself."""
        return 0

    def reach(self, site: Site) -> tuple[int, ...]:
        """The tokens of a piece; of channels, the token itself."""
        grid = site.grid
        if self.axis == "channels":
            return (0,) * len(grid)
        tokens = torch.Size(grid).numel()
        starts = [head * (tokens // self.heads) for head in range(self.heads)]
        spans = []
        for axis, side in enumerate(grid):
            row = torch.Size(grid[axis + 1:]).numel()
            spans.append(max(
                (last - 1) // row - first // row if (last - 1) // (row * side) == first // (row * side) else side - 1
                for first, last in zip(starts, [*starts[1:], tokens], strict=True) if last > first))
        return tuple(spans)


class GaussianBlock(nn.Sequential):
    """x += layer(x) for every layer: axes, heads and Gaussians of each, on grids (B, *grid, C)."""

    def __init__(self, site: Site, axes: Sequence[str], heads: Sequence[int], gaussians: Sequence[int]) -> None:
        layers = zip(axes, heads, gaussians, strict=True)
        super().__init__(*(GaussianAdaptive(site, count, axis, several) for axis, several, count in layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x)
        return x


def importance(affinity: Affinity) -> list[Tensor]:
    """The importance factor of every number of the map, in [0, 1]: (N, C) for each recorded layer, in their order,

        IF = (G - min G) / (max G - min G),   G the weights, averaged over the images.

        with record(model) as r: model(images)
        importance(r["blocks.0.mixer"])[0].mean(-1)      # of each token
    Source: Ioannides et al., 2024, on the Importance Factor.
    """
    factors = []
    for part in affinity.parts:
        mean = part.weights[:, :, 0].mean(0).T
        factors.append((mean - mean.min()) / (mean.max() - mean.min()).clamp(min=torch.finfo(mean.dtype).tiny))
    return factors


def _as_row(value: Tensor) -> Any:
    return value[None]


def _heads(theirs: str, ours: str) -> KeyMap:
    """The authors' parameters of each head as rows of ours."""
    return tuple(rule for head in range(64) for rule in (
        (rf"{theirs}attention_heads\.{head}\.mean_offsets", rf"{ours}offset#{head}", _as_row),
        (rf"{theirs}attention_heads\.{head}\.c", rf"{ours}width#{head}", _as_row)))


AUTHORS: KeyMap = (*_heads("", ""), *_heads(r"layers\.(\d+)\.", r"\1."), ("mean_offsets", "offset", _as_row),
                   ("c", "width", _as_row))
