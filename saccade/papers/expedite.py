"""Expedite: neighbouring tokens are clustered for the deeper blocks and put back at the end, without any training.

Before block `start` the grid of tokens becomes a coarser one. Its tokens are the means of those near them, weighed by
how alike they are, in a few rounds,
    a_ij = softmax over centroids i near j of (-t |c_i - x_j|^2),   c_i <- sum_j a_ij x_j / sum_j a_ij.
The blocks after that run on clusters c alone. At the end each token x_j is made of what became of the clusters that it
was most alike, with weights of length 1,
    y_j = sum_i w_ij y(c_i),   w_j = u_j / |u_j|,   u_ij = exp(-t |x_j - c_i|^2) for the k nearest i, else 0.

Liang, Yuan, Ding, Luo, Lin, Jia, Zhang, Zhang, Hu, "Expediting Large-Scale Vision Transformer for Dense Prediction
without Fine-tuning", 2022, section 3.

Hosts: our plain transformers, timm's, and the picture encoder of transformers' SAM, whose windows are clustered each.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.swap import Handle
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.host import HostBlock, blocks_of, check_rate, native_grid, open_blocks

CARD = Card(
    "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
    authors="Liang, Yuan, Ding, Luo, Lin, Jia, Zhang, Zhang, Hu",
    year=2022,
    systems=("expedite",),
    arxiv="2210.01035",
    code="Expedit-LargeScale-Vision-Transformer/Expedit-Segmenter@63f4066",
    licence="Apache-2.0",
    read="paper, code",
    keywords="token clustering, token reconstruction, training-free, dense prediction, segment anything",
    kinds=("token reduction",),
    methods={"expedite": "expedite"},
    goldens=("op_expedit_token_clustering", "op_expedit_token_reconstruction", "expedit_hourglass_vit_tiny",
             "expedit_sam_tiny"),
    tests=("tests/papers/test_expedite.py",),
)


def cluster(x: Tensor, cells: tuple[int, ...], rounds: int = 5, temperature: float = 0.02, window: int = 5) -> Tensor:
    """x (B, H, W, C) as its clusters (B, h w, C), the means of `cells` (h, w) to begin with.

    A token belongs to the clusters at most window // 2 cells from its own. No gradient goes through the weights.
    (Section 3.2, equations 2 and 3.)
    """
    tokens, grid = x.flatten(1, 2), tuple(x.shape[1:3])
    near = near_cells(grid, cells, window // 2, x.device)
    parts = bands(grid, cells, window // 2)
    clusters = F.adaptive_avg_pool2d(x.movedim(-1, 1), (cells[0], cells[1])).movedim(1, -1).flatten(1, 2)
    for _ in range(rounds):
        sums, totals = torch.zeros_like(clusters), torch.zeros_like(clusters[..., :1])
        for here, reach in parts:
            weights = assignments(clusters[:, reach], tokens[:, here], near[reach, here], temperature).to(x.dtype)
            sums[:, reach] += weights @ tokens[:, here]
            totals[:, reach] += weights.sum(-1, keepdim=True)
        clusters = sums / (totals + 1e-16)
    return clusters


@torch.no_grad()
def assignments(clusters: Tensor, tokens: Tensor, near: Tensor, temperature: float) -> Tensor:
    """How much each token (B, N, C) belongs to each of its clusters (B, M, C): (B, M, N), in float32 at least.

    The softmax over clusters of -t |c|^2 + 2t c.x; the -t |x|^2 of a token is the same for all.
    """
    wide = torch.promote_types(clusters.dtype, torch.float32)
    clusters, tokens = clusters.to(wide), tokens.to(wide)
    with torch.autocast(clusters.device.type, enabled=False):
        alone = near - temperature * clusters.square().sum(-1, keepdim=True)
        return torch.baddbmm(alone, clusters, tokens.mT, alpha=2 * temperature).softmax(1)


def bands(grid: tuple[int, ...], cells: tuple[int, ...], radius: int) -> list[tuple[slice, slice]]:
    """The tokens of a few rows and all clusters that they may belong to, from the top to the bottom.

    With a radius of 2 a token meets at most eight rows of clusters: of 22, a third of the work.
    """
    height, width = cells
    own = [row * height // grid[0] for row in range(grid[0])]
    found, step = [], max(2 * radius, 1)
    for first in range(0, height, step):
        rows = [row for row, cell in enumerate(own) if first <= cell < first + step]
        top, bottom = max(first - radius, 0), min(first + step + radius, height)
        if rows:
            found.append((slice(rows[0] * grid[1], (rows[-1] + 1) * grid[1]), slice(top * width, bottom * width)))
    return found


def reconstruct(x: Tensor, before: Tensor, after: Tensor, nearest: int = 20, temperature: float = 0.02) -> Tensor:
    """What became of the clusters, x (B, M, C), as tokens (B, N, C).

    `before` (B, N, C) are the tokens and `after` (B, M, C) their clusters, as they were then. (Section 3.3, equation 4;
    in the code, as here, the weights of a token have length 1, not sum 1.)
    """
    weights = (-temperature * squared_distance(before, after)).exp()
    least = weights.topk(min(nearest, weights.shape[-1]), -1).values[..., -1:]
    weights = weights.masked_fill(weights < least, 0)  # of equal ones, as in windows of padding, all stay
    return F.normalize(weights, dim=-1).to(x.dtype) @ x


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, (B, N, C) and (B, M, C) -> (B, N, M), in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    with torch.autocast(a.device.type, enabled=False):
        inner = a @ b.mT
    return (a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * inner).clamp(min=0)


@table
def near_cells(grid: tuple[int, ...], cells: tuple[int, ...], radius: int, device: torch.device) -> Tensor:
    """(h w, H W): 0 where a token's own cell is at most `radius` rows and columns from a cell, else -inf."""
    axes = []
    for side, count in zip(grid, cells, strict=True):
        own = torch.arange(side, device=device) * count // side
        axes.append((torch.arange(count, device=device)[:, None] - own).abs() <= radius)  # (count, side)
    near = (axes[0][:, None, :, None] & axes[1][None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.zeros(near.shape, device=device).masked_fill(~near, -torch.inf)


class Hourglass:
    """How tokens are clustered, and those of the forward that runs, for the blocks of one host."""

    before: Tensor
    after: Tensor
    grid: tuple[int, ...]

    def __init__(self, keep: float, rounds: int, temperature: float, window: int, nearest: int) -> None:
        self.keep, self.rounds, self.temperature = keep, rounds, temperature
        self.window, self.nearest = window, nearest

    def cells(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The coarser grid: a share `keep` of the tokens, of each side its root."""
        return tuple(max(1, round(side * self.keep**0.5)) for side in grid)

    def shrink(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, h w, C); what is needed to come back is kept."""
        cells = self.cells(tuple(x.shape[1:3]))
        self.before = x.flatten(1, 2)
        self.after = cluster(x, cells, self.rounds, self.temperature, self.window)
        return self.after

    def grow(self, x: Tensor) -> Tensor:
        """(B, h w, C) -> (B, H W, C)."""
        return reconstruct(x, self.before, self.after, self.nearest, self.temperature)


class HourglassBlock(HostBlock):
    """A host's block; `begins` clusters what comes, `ends` gives all tokens back."""

    def __init__(
        self, hourglass: Hourglass, begins: bool, inside: bool, ends: bool, native: tuple[int, ...], **host: Any
    ) -> None:
        super().__init__(**host)
        self.hourglass, self.native = hourglass, native
        self.begins, self.inside, self.ends = begins, inside, ends

    def forward(self, tokens: Tensor, *place: Any) -> Tensor:
        self.start(tokens)
        if self.begins:
            grid = self.grid(tokens.shape[1] - self.prefix, place)
            clusters = self.hourglass.shrink(tokens[:, self.prefix:].unflatten(1, grid))
            tokens = torch.cat([tokens[:, :self.prefix], clusters], 1)
            numbers = self.kept.numbers[:, :self.prefix]
            self.kept.numbers = torch.cat([numbers, numbers.new_full((1, clusters.shape[1]), -1)], 1)
        tokens = self.add_mlp(self.add_attention(tokens))
        return self.grown(tokens) if self.ends else tokens

    def whole(self, tokens: Tensor) -> Tensor:
        return self.grown(tokens) if self.inside and not self.ends else tokens

    def grown(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :self.prefix], self.hourglass.grow(tokens[:, self.prefix:])], 1)

    def grid(self, count: int, place: tuple[Any, ...]) -> tuple[int, ...]:
        """The grid of tokens: ours is told, timm's is the native one or a square."""
        if len(place) > 1:
            return tuple(place[1])
        side = round(count**0.5)
        grids = [grid for grid in (self.native, (side, side)) if torch.Size(grid).numel() == count]
        if not grids:
            raise SaccadeError(f"expedite: {count} tokens are neither the host's grid {self.native} nor a square; give "
                               "pictures of the host's size, or square ones")
        return grids[0]


class HourglassWindows(nn.Module):
    """A layer of SAM's encoder on the clusters of each window; layers and their parameters keep their names."""

    def __init__(self, layer: Any, hourglass: Hourglass, window: int, begins: bool, ends: bool) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        inner = copy.copy(layer)  # the same children in smaller windows
        inner.window_size = layer.window_size and hourglass.cells((window,))[0]
        self._layer = (inner,)  # in a tuple: no child of its own
        self.hourglass, self.window, self.begins, self.ends = hourglass, (window, window), begins, ends

    def forward(self, x: Tensor) -> Tensor:
        if self.begins:
            windows = partition(pad_to_multiple(x, self.window), self.window).unflatten(1, self.window)
            self.hourglass.grid = tuple(x.shape[1:3])
            cells = self.hourglass.cells(self.window)
            x = merge(self.hourglass.shrink(windows), cells, self._scaled(cells))
        x = self._layer[0](x)
        if self.ends:
            cells = self.hourglass.cells(self.window)
            x = merge(self.hourglass.grow(partition(x, cells)), self.window, self._scaled(self.window))
            x = crop(x, self.hourglass.grid)
        return x

    def _scaled(self, window: tuple[int, ...]) -> tuple[int, ...]:
        """The sides of the padded map when its windows are of this size."""
        return tuple(-(-side // full) * part
                     for side, full, part in zip(self.hourglass.grid, self.window, window, strict=True))


def expedite(
    model: nn.Module,
    keep: float = 0.49,
    start: int | None = None,
    rounds: int = 5,
    temperature: float = 0.02,
    window: int = 5,
    nearest: int = 20,
) -> Handle:
    """Run the blocks from number `start` (by default 10 of 24) on a share `keep` of clusters; 1 clusters nothing.

    The default is the published setting of ViT-L/16 at 640 pixels: after ten blocks, 28 x 28 clusters of 40 x 40
    tokens.
    """
    check_rate("expedite", "keep", keep)
    sam = type(model).__name__ == "SamVisionEncoder"
    layers: Any = model.layers if sam else blocks_of(model, "expedite")
    depth = len(layers)
    begin = depth * 10 // 24 if start is None else start
    if not 0 <= begin < depth:
        raise SaccadeError(f"expedite: start={start}, and the host has the blocks 0 to {depth - 1}")
    hourglass = Hourglass(keep, rounds, temperature, window, nearest)
    chosen = range(begin, depth) if keep < 1 else range(0)
    if sam:
        return _expedite_sam(model, hourglass, chosen)

    def build(number: int, **host: Any) -> nn.Module:
        inside = number in chosen
        return HourglassBlock(hourglass, inside and number == begin, inside, inside and number == depth - 1,
                              native_grid(model), **host)

    return open_blocks(model, "expedite", build)


def _expedite_sam(model: Any, hourglass: Hourglass, chosen: range) -> Handle:
    window = max(layer.window_size for layer in model.layers)
    if not window:
        raise SaccadeError("expedite clusters the windows of SAM's encoder, and all layers of this one are global")
    return Handle(model, {
        f"layers.{number}": HourglassWindows(model.layers[number], hourglass, window, number == chosen[0],
                                             number == chosen[-1])
        for number in chosen
    })
