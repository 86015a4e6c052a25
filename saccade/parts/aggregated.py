"""Length-scaled cosine attention with continuous position bias, to all tokens or to near ones and a pooled map."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.keymap import KeyMap, matrix_from_1x1
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import in_cache
from saccade.ops.local import local_scores, local_sum, neighbour_tokens
from saccade.ops.pooling import adaptive_mean
from saccade.ops.sizes import larger
from saccade.ops.tables import table
from saccade.ops.toeplitz import attend_at_offsets
from saccade.parts.attention import check_heads
from saccade.parts.tokens import global_tokens

HIDDEN = 512  # width of the position MLP
PIECE = 256  # rows of its hidden state that a CPU's cache holds


@table
def _axis_offsets(side: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distances of a query to the middle of a cell on one axis, each once (U,), and which one holds, (side, cells).

    Cells are those of adaptive pooling; where they divide the side, middles are a whole number of tokens apart.
    """
    cell = torch.arange(cells, device=device)
    twice_middle = cell * side // cells + ((cell + 1) * side + cells - 1) // cells - 1
    twice = 2 * torch.arange(side, device=device)[:, None] - twice_middle
    low, high, step = -2 * (side - 1), 2 * (side - 1), 1  # all that can be: what export with free sizes takes
    if isinstance(side, int) and isinstance(cells, int):
        low, high = -((cells - 1) * side // cells + side - 1), high + 1 - -(-side // cells)
        step = 1 if side % cells else 2
    count = (high - low) // step + 1
    return (low + step * torch.arange(count, device=device)) / 2, (twice - low) // step


def _scaled(distance: Tensor, native: int) -> Tensor:
    """sign(x) log2(1 + |x|) / 3 for x = 8 distance / (native - 1)."""
    scaled = distance / max(native - 1, 1) * 8
    return scaled.sign() * torch.log2(scaled.abs() + 1) / 3


@table
def _apart(grid: tuple[int, ...], native: tuple[int, ...], device: torch.device) -> Tensor:
    """(*(2 side - 1), rank) coordinates of query - key, those of key - query in ascending order."""
    axes = [_scaled(torch.arange(side - 1, -side, -1, device=device), whole)
            for side, whole in zip(grid, native, strict=True)]
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1)


@table
def _coordinates(
    grid: tuple[int, ...], cells: tuple[int, ...], native: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Coordinates (U, rank) of all distances; the row of each pair, (N, M)."""
    axes, index = [], torch.zeros(1, 1, dtype=torch.long, device=device)
    for side, cell, whole in zip(grid, cells, native, strict=True):
        distance, row = _axis_offsets(side, cell, device)
        axes.append(_scaled(distance, whole))
        index = index[:, None, :, None] * distance.shape[0] + row[None, :, None, :]
        index = index.flatten(2, 3).flatten(0, 1)
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2), index


class PositionMlp(nn.Module):
    """bias[h, i, j] = fc2(relu(fc1(coordinates of i - j)))[h], once for each distance: (grid, cells) -> (heads, N, M).

    Distances are measured in the native grid's sides, so that one MLP serves every grid. (Liu et al., "Swin Transformer
    V2", 2022, section 3.3, with TransNeXt's coordinates.)
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.native = site.grid
        self.fc1 = nn.Linear(site.rank, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, site.heads)

    def forward(self, grid: tuple[int, ...], cells: tuple[int, ...]) -> Tensor:
        points, index = _coordinates(grid, cells, self.native, self.fc1.weight.device)
        return self.at(points).T.contiguous().index_select(1, index.flatten()).unflatten(1, index.shape)

    def offsets(self, grid: tuple[int, ...]) -> Tensor:
        """(heads, *(2 side - 1)) by key - query: the bias among the tokens of a grid, an entry a distance."""
        points = _apart(grid, self.native, self.fc1.weight.device)
        return self.at(points).movedim(-1, 0)

    def at(self, points: Tensor) -> Tensor:
        points = points.to(self.fc1.weight.dtype)
        if not in_cache(points):
            return self.fc2(F.relu(self.fc1(points)))
        pieces = [self.fc2(self.fc1(piece).relu_()) for piece in points.flatten(0, -2).split(PIECE)]
        return torch.cat(pieces).unflatten(0, points.shape[:-1])

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], cells: tuple[int, ...]) -> int:
        """Multiply-adds: (rank + heads) hidden for each distance that occurs."""
        occurring = 1
        for side, count in zip(grid, cells, strict=True):
            middles = [cell * side // count - (-(cell + 1) * side // count) - 1 for cell in range(count)]
            occurring *= len({2 * place - middle for place in range(side) for middle in middles})
        return occurring * HIDDEN * (site.rank + site.heads)


class CosineAttention(nn.Module):
    """out = proj(softmax(log(N) s (q/|q| + e) . k/|k| + bias) v) over all tokens: (B, *grid, C) -> (B, *grid, C).

    s = softplus(temperature) and the query embedding e are learned a head; log(N) keeps the softmax as sharp on a
    longer sequence. (Shi, "TransNeXt", 2023, section 3.3.)
    """

    ranks, weights = (1, 2, 3), True
    template = Template("cosine of q + e and k, and offset", "softmax, scaled by log N", "sum of v")
    undecayed: tuple[str, ...] = ("temperature", "query_embedding")

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        width = check_heads(site)
        self.heads = site.heads
        # softplus(temperature) starts at 1 / 0.24
        self.temperature = nn.Parameter(torch.full((site.heads, 1, 1), 1 / 0.24).expm1().log())
        self.query_embedding = nn.Parameter(torch.zeros(site.heads, 1, width))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.bias = PositionMlp(site)
        self.proj = nn.Linear(site.dim, site.dim)
        self.add_projections(site, qkv_bias)

    def add_projections(self, site: Site, qkv_bias: bool) -> None:
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)

    def sharpened(self, q: Tensor, length: Any) -> Tensor:
        """Unit queries (B, *grid, h, d), embedded and scaled by temperature and the log of the number of keys."""
        scale = F.softplus(self.temperature)[:, 0] * length
        return (q + self.query_embedding[:, 0]) * scale

    def weigh(self, heads: Tensor, x: Tensor) -> Tensor:
        """What becomes of the heads' outputs (B, *grid, h, d) before they are joined."""
        return heads

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        tokens = prod(grid)
        length = torch.full((), tokens, dtype=x.dtype, device=x.device).log()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q = self.sharpened(F.normalize(q, dim=-1), length)
        q, k, v = (part.flatten(1, -3).transpose(1, 2) for part in (q, F.normalize(k, dim=-1), v))
        out = attend_at_offsets(q, k, v, self.bias.offsets(grid), grid, scale=1.0,
                                where=lambda: global_tokens(tokens, x.device))
        heads = out.transpose(1, 2).unflatten(1, grid)
        return self.proj(self.weigh(heads, x).flatten(-2))

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products."""
        return 4 * prod(grid) * site.dim**2 + 2 * prod(grid) ** 2 * site.dim

    def shared_cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of the position MLP, once for the whole batch."""
        return self.bias.cost(site, grid, grid)


class AggregatedAttention(CosineAttention):
    """Cosine attention to the window around a token and to the pooled map, in one softmax: sharp near, coarse far.

    (B, *grid, C) -> (B, *grid, C). Keys and values of the far field come from norm(pool(gelu(reduce(x)))), pooled
    `ratio` times a side, or to `pool` cells. Learned tokens add to the weights of the window, after the softmax, what
    depends on the query alone: w = softmax(...) + q/|q| T + b. (Shi, "TransNeXt", 2023, sections 3.1 and 3.2.)
    """

    template = Template(
        "cosine of q and k, near and pooled, and offsets",
        "one softmax over both, length-scaled",
        "sum of v, near and pooled",
    )

    undecayed = (*CosineAttention.undecayed, "local_bias")

    def __init__(
        self, site: Site, ratio: int = 2, window: int = 3, pool: int | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__(site, qkv_bias)
        self.ratio, self.window, self.pool = ratio, window, pool
        around = window**site.rank
        self.local_bias = nn.Parameter(torch.zeros(site.heads, around))
        self.tokens = nn.Parameter(torch.zeros(site.heads, site.dim // site.heads, around))
        self.token_bias = nn.Parameter(torch.zeros(site.heads, 1, around))
        nn.init.trunc_normal_(self.local_bias, std=0.0004)
        nn.init.trunc_normal_(self.tokens, std=0.02)

    def add_projections(self, site: Site, qkv_bias: bool) -> None:
        self.q = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.kv = nn.Linear(site.dim, 2 * site.dim, bias=qkv_bias)
        self.reduce = nn.Linear(site.dim, site.dim)
        self.norm = nn.LayerNorm(site.dim)

    def cells(self, grid: tuple[int, ...]) -> tuple[Any, ...]:
        """The sides of the pooled map."""
        if self.pool is not None:
            return (self.pool,) * len(grid)
        return tuple(larger(side // self.ratio, 1) for side in grid)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        cells = self.cells(grid)
        near = neighbour_tokens(grid, self.window, x.device)
        outside = (near < 0).view(*grid, 1, -1)
        keys = (~outside).sum(-1, keepdim=True) + prod(cells)
        unit = F.normalize(self.q(x).unflatten(-1, (self.heads, -1)), dim=-1)
        q = self.sharpened(unit, keys.to(x.dtype).log())
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        logits = local_scores(q, F.normalize(k, dim=-1), self.window) + self.local_bias
        logits = logits.masked_fill(outside, -torch.inf).flatten(1, -3).transpose(1, 2)

        pooled = self.norm(adaptive_mean(F.gelu(self.reduce(x)), cells)).flatten(1, -2)
        k_far, v_far = self.kv(pooled).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, unit = (part.flatten(1, -3).transpose(1, 2) for part in (q, unit))
        far = q @ F.normalize(k_far, dim=-1).transpose(-2, -1) + self.bias(grid, cells)

        weights = torch.cat([logits, far], -1).softmax(-1)
        if recording():
            note(weights.transpose(1, 2).flatten(0, 1)[:, :, None], lambda: self._where(grid, cells, near))
        w_near, w_far = weights.split([near.shape[1], far.shape[-1]], -1)
        w_near = w_near + unit @ self.tokens + self.token_bias
        heads = local_sum(w_near.transpose(1, 2).unflatten(1, grid), v, self.window)
        heads = heads + (w_far @ v_far).transpose(1, 2).unflatten(1, grid)
        return self.proj(self.weigh(heads, x).flatten(-2))

    @staticmethod
    def _where(grid: tuple[int, ...], cells: tuple[int, ...], near: Tensor) -> tuple[Tensor, Tensor]:
        """A pooled key stands for the token in the middle of its cell."""
        far = torch.zeros(1, dtype=torch.long, device=near.device)
        for side, count in zip(grid, cells, strict=True):
            place = (2 * torch.arange(count, device=near.device) + 1) * side // (2 * count)
            far = (far[:, None] * side + place).flatten()
        query = torch.arange(near.shape[0], device=near.device)
        return query[:, None], torch.cat([near, far.expand(near.shape[0], -1)], 1)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds with N tokens, M pooled keys, W in a window: (5 N + 2 M) C^2 + (2 M + 3 W) N C."""
        tokens, pooled = prod(grid), prod(self.cells(grid))
        near = 3 * self.window**site.rank
        return (5 * tokens + 2 * pooled) * site.dim**2 + (2 * pooled + near) * tokens * site.dim

    def shared_cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return self.bias.cost(site, grid, self.cells(grid))


# The names of TransNeXt's code, which MoH's keeps.
NAMES: KeyMap = (
    (r"cpb_(fc\d\..*)", r"bias.\1"),
    (r"relative_pos_bias_local", "local_bias"),
    (r"learnable_tokens", "tokens"),
    (r"learnable_bias", "token_bias"),
    (r"sr\.weight", "reduce.weight", matrix_from_1x1),
    (r"sr\.bias", "reduce.bias"),
    (r"(.*)", r"\1"),
)
