"""Neighborhood attention on sequences, images and volumes: a token looks at its own k^n nearest tokens and no other."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.ops import reference
from saccade.ops.attend import attend
from saccade.ops.choice import Case, choose, natten, to_choose
from saccade.ops.sizes import ceil_div, modulo
from saccade.ops.tables import table

GATHER = 27  # a key costs its tile this many query-key pairs (to fetch and to load), measured; it ranks tile sizes


class Window(NamedTuple):
    """What a query sees on one axis, in steps of its residue class (methods, as older torch compiles no properties)."""

    kernel: int
    dilation: int
    stride: int = 1
    causal: bool = False

    def before(self) -> int:
        """How many steps before a query its window can begin, where no border moves it."""
        return self.kernel - 1 if self.causal else self.kernel // 2 + (self.stride - 1) // 2

    def margin(self) -> int:
        """How many keys a tile fetches beyond one a query."""
        return self.kernel - 1 + (0 if self.causal else self.stride - 1)

    def least(self) -> int:
        """Fewest queries a tile, so that its keys hold the windows that a border moves, in the first tile or the last
        two alone.
        """
        return self.kernel if self.causal or self.stride > 1 else self.kernel // 2 + 1

    def whole_groups(self, queries: int) -> int:
        """The next number of queries that is a multiple of the stride: tiles then have the same masks."""
        return ceil_div(queries, self.stride) * self.stride

    def bounds(self, at: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key that the queries `at` see in a class of `length` steps."""
        middle = self.stride - 1 if self.causal else self.stride // 2
        leader = (at // self.stride * self.stride + middle).minimum(length - 1)
        if self.causal:
            return (leader - self.kernel + 1).clamp(min=0), at
        low = (leader - self.kernel // 2).clamp(min=0).minimum(length - self.kernel)
        return low, low + self.kernel - 1


class Axis(NamedTuple):
    """One axis cut in T tiles of Q queries, which see K keys at most; tiles whose masks agree are of one kind."""

    query: Tensor  # (T, Q) position of each query; the last one again where a tile is not full
    key: Tensor  # (T, K) position of each key, likewise inside the axis
    tile: Tensor  # (L,) the tile that answers for a position
    row: Tensor  # (L,) and the row in it
    kind: Tensor  # (T,)
    seen: Tensor  # (kinds, Q, K) whether the key is in the query's window
    shift: Tensor  # (Q, K) index in the bias: (key - query) / dilation + k - 1


class Tiles(NamedTuple):
    """The same for a grid of N tokens (the product of its axes, row-major) and B images, one after another."""

    shape: tuple[int, int, int]  # T tiles an image, Q, K
    query: Tensor  # (B T Q,) the token of each query
    key: Tensor  # (B T K,)
    slot: Tensor  # (B N,) place of each token among the queries
    kind: Tensor  # (B T,)
    mask: Tensor  # (kinds, 1, Q, K) 0 or -inf
    shift: Tensor  # (Q, K)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
) -> Tensor:
    """out_i = sum over j in N(i) of softmax_j(scale q_i . k_j + bias[j - i]) v_j, with exactly prod(kernel) j in N(i).

    On each axis N(i) holds the `kernel` positions i + dilation * step around i (an even kernel has one more before i
    than after it), moved inwards at the borders, so that it is never cut or padded; j stays in i's residue class. With
    a `stride`, the queries of a group of that many steps share the window of their middle one (of the later of two
    middle ones). On a `causal` axis the window ends at i and starts `kernel` - 1 steps before the group's last query:
    there the first queries see fewer keys.

    q, k, v, out (B, *S, h, d) with one, two or three grid axes S: views of one Linear's output, uncopied. kernel,
    dilation, stride, causal are one value or one an axis. bias (h, 2 k_1 - 1, ...) is indexed by (j - i) / dilation
    + k - 1. scale defaults to d^-1/2. Raises SaccadeError where shapes disagree, an axis is under kernel x dilation
    (pad first), or a stride is over its kernel.

    Fast because a tile of near queries fetches the keys around it once and attends to them densely under a mask; on a
    GPU FlexAttention or NATTEN's kernels run where they can (`ops.explain_choice`).
    Source: Hassani et al., Neighborhood Attention Transformer, 2023, section 3; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, 2022, section 3; Hassani et al., Faster Neighborhood Attention, 2024 (causal), and its code
    (stride).
    """
    B, *grid, h, d = q.shape
    rank = len(grid)
    windows = _checked(q, k, v, kernel, dilation, stride, causal, bias)
    if to_choose(q) and (other := _other_path(q, k, v, windows, bias, scale)) is not None:
        return other
    tiles = _tiles(B, tuple(grid), windows, q.dtype, q.device)
    T, Q, K = tiles.shape
    whole = isinstance(T, int) and T == 1  # one tile holds all tokens in their order: nothing to fetch
    logits = tiles.mask
    if bias is not None:
        logits = logits + bias.to(q.dtype).flatten(1)[:, tiles.shift]
    if whole:
        q, k, v = (x.flatten(1, rank) for x in (q, k, v))
    else:
        q = q.flatten(0, rank).index_select(0, tiles.query).view(B * T, Q, h, d)
        k, v = (x.flatten(0, rank).index_select(0, tiles.key).view(B * T, K, h, d) for x in (k, v))
        logits = logits.index_select(0, tiles.kind)

    def where() -> tuple[Tensor, Tensor]:
        N = prod(grid)
        query = torch.full((T * Q,), -1, device=q.device)  # what a tile asks again stays so
        query = query.scatter(0, tiles.slot[:N].long(), torch.arange(N, device=q.device))
        return query.view(T, Q), tiles.key[: T * K].view(T, K).long()

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, logits, where=where, scale=scale).transpose(1, 2)
    if not whole:
        out = out.reshape(B * T * Q, h, d).index_select(0, tiles.slot)
    return out.reshape(B, *grid, h, d)


def _other_path(
    q: Tensor, k: Tensor, v: Tensor, windows: tuple[Window, ...], bias: Tensor | None, scale: float | None
) -> Tensor | None:
    """The same by a path that is faster here, or preferred; None where that is the tiles."""
    B, *sides, heads, d = q.shape
    grid, rank = tuple(sides), len(sides)
    kernel, dilation, stride, causal = zip(*windows, strict=True)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias) if x is not None)
    path = choose(Case("neighborhood", q.device.type, q.dtype, grid, heads, d, B, bias is not None, training,
                       f"kernel {kernel}, dilation {dilation}", kernel)).path
    if path == "flex":
        from saccade.ops.flex import flex_kernel  # imports torch's compiler
        from saccade.ops.pattern import Neighborhood

        q, k, v = (x.flatten(1, rank).transpose(1, 2) for x in (q, k, v))
        bias = None if bias is None else bias.to(q.dtype)
        out = flex_kernel(q, k, v, Neighborhood(grid, windows), bias, scale)
        return out.transpose(1, 2).unflatten(1, grid)
    if path == "natten":
        run = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
        return run(q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal, scale=scale)
    if path == "reference":
        slow = reference.neighborhood_attention
        return slow(q, k, v, kernel, dilation, bias, stride=stride, causal=causal, scale=scale).to(q)
    return None


def _checked(
    q: Tensor, k: Tensor, v: Tensor, kernel: int | tuple[int, ...], dilation: int | tuple[int, ...],
    stride: int | tuple[int, ...], causal: bool | tuple[bool, ...], bias: Tensor | None,
) -> tuple[Window, ...]:
    """The window on each axis, once everything is known to fit."""
    rank = q.dim() - 3
    if not 1 <= rank <= 3 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise SaccadeError(f"q, k, v of shapes {shapes}: give all three as (B, *grid, heads, d) with 1 to 3 grid axes")
    each = [(value,) * rank if isinstance(value, int) else tuple(value) for value in (kernel, dilation, stride, causal)]
    if any(len(values) != rank for values in each) or min(*each[0], *each[1], *each[2]) < 1:
        raise SaccadeError(f"kernel {kernel}, dilation {dilation}, stride {stride}, causal {causal}: give one positive "
                           f"number, or one an axis ({rank}), for each")
    windows = tuple(Window(*of_axis) for of_axis in zip(*each, strict=True))
    for size, (side, step, group, _) in zip(q.shape[1:-2], windows, strict=True):
        if isinstance(size, int) and size < side * step:  # of a size left open it would be a guard
            raise SaccadeError(f"axis of {size} under kernel {side} x dilation {step}: pad it to {side * step}")
        if group > side:
            raise SaccadeError(f"stride {group} over kernel {side}: some queries would see none; give at most {side}")
    expected = (q.shape[-2], *[2 * window.kernel - 1 for window in windows])
    if bias is not None and bias.shape != expected:
        raise SaccadeError(f"bias of shape {tuple(bias.shape)}: give {expected}, that is (heads, 2 kernel - 1 an axis)")
    return windows


@table
def _tiles(
    B: int, grid: tuple[int, ...], windows: tuple[Window, ...], dtype: torch.dtype, device: torch.device
) -> Tiles:
    sizes = _tile_sizes(grid, windows)
    first, *others = [_axis(*of_axis, device) for of_axis in zip(grid, windows, sizes, strict=True)]
    query, key, tile, row, kind, seen, shift = first
    for size, window, axis in zip(grid[1:], windows[1:], others, strict=True):
        query = _outer(query * size, axis.query)
        key = _outer(key * size, axis.key)
        tile = (tile[:, None] * axis.query.shape[0] + axis.tile).flatten()
        row = (row[:, None] * axis.query.shape[1] + axis.row).flatten()
        kind = (kind[:, None] * axis.seen.shape[0] + axis.kind).flatten()
        seen = _outer(seen, axis.seen)
        shift = _outer(shift[None] * (2 * window.kernel - 1), axis.shift[None])[0]
    (T, Q), K, N = query.shape, key.shape[1], prod(grid)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)
    image = torch.arange(B, device=device)[:, None]

    def of_images(index: Tensor, stride: int) -> Tensor:
        return (image * stride + index.flatten()).flatten().int()  # index_select reads these faster than int64

    return Tiles(
        (T, Q, K), of_images(query, N), of_images(key, N), of_images(tile * Q + row, T * Q), of_images(kind, 0),
        mask[:, None], shift,
    )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """c[(i, i'), (x, x'), ...] = a[i, x, ...] + b[i', x', ...] (and, for truth values): all pairs along every axis."""
    for dim in range(a.dim()):
        a, b = a.unsqueeze(2 * dim + 1), b.unsqueeze(2 * dim)
    c = a & b if a.dtype == torch.bool else a + b
    for dim in range(c.dim() // 2):
        c = c.flatten(dim, dim + 1)
    return c


def _tile_sizes(grid: tuple[int, ...], windows: tuple[Window, ...]) -> tuple[int | None, ...]:
    """Queries a tile, an axis: residue classes are cut in 1, 2, 4, ... so that it costs least; None if not known."""
    # Sizes that torch.export leaves open cannot choose: any branch on them would be baked in.
    if not all(isinstance(size, int) for size in grid):
        return (None,) * len(grid)
    choices, groups = [], prod([window.dilation for window in windows])
    for size, window in zip(grid, windows, strict=True):
        longest = ceil_div(size, window.dilation)
        cuts = {window.whole_groups(-(-longest // 2**power)) for power in range(longest.bit_length())}
        choices.append([(longest, longest), *((longest, t) for t in sorted(cuts) if window.least() <= t < longest)])

    def cost(cut: tuple[tuple[int, int], ...]) -> int:
        queries = prod([t for _, t in cut])
        keys = prod([t if t == longest else t + window.margin()
                     for (longest, t), window in zip(cut, windows, strict=True)])
        tiles = groups * prod([-(-longest // t) for longest, t in cut])
        return tiles * keys * (queries + (GATHER if tiles > 1 else GATHER // 2))

    return tuple(t for _, t in sorted(product(*choices), key=cost)[0])  # older torch compiles no min with a key


def _axis(size: int, window: Window, queries: int | None, device: torch.device) -> Axis:
    """The tables of an axis. Residue classes have their own tiles; numbers count steps in the class until the end."""
    kernel, dilation = window.kernel, window.dilation
    longest = (size + dilation - 1) // dilation
    whole = queries == longest
    Q = window.whole_groups(max(8, window.least())) if queries is None else queries
    K = longest if whole else Q + window.margin()
    count = (longest + Q - 1) // Q
    rows, columns = torch.arange(Q, device=device), torch.arange(K, device=device)

    def first(number: Tensor, length: Tensor) -> Tensor:
        """First query of a tile; the last tile of a class is moved back to be full, and asks some queries again."""
        return torch.minimum(number * Q, (length - Q).clamp(min=0))

    def first_key(query: Tensor) -> Tensor:
        return query * 0 if whole else query - window.before()

    tile = torch.arange(dilation * count, device=device)
    residue, number = tile // count, modulo(tile, count)
    length = (size - residue + dilation - 1) // dilation
    start = first(number, length)
    last = (length - 1)[:, None]
    query = (start[:, None] + rows).minimum(last) * dilation + residue[:, None]
    key = (first_key(start)[:, None] + columns).clamp(min=0).minimum(last) * dilation + residue[:, None]

    position = torch.arange(size, device=device)
    answer = position % dilation * count + position // dilation // Q

    # Masks differ in the first tile, the last two, and between classes of two lengths: these stand for all.
    edges = 4 if queries is None else min(count, 4)
    lengths = 1 if dilation == 1 or (queries is not None and size % dilation == 0) else 2
    kind = (longest - length) * edges + torch.maximum(number.clamp(max=1), number - count + edges)
    sample = torch.arange(lengths * edges, device=device)
    sample_number = torch.where(sample % edges == 0, 0, (sample % edges + count - edges).clamp(min=0))
    sample_length = longest - sample // edges
    asked, asked_length = first(sample_number, sample_length)[:, None, None], sample_length[:, None, None]
    at = (asked + rows[:, None]).minimum(asked_length - 1)
    key_at = first_key(asked) + columns
    low, high = window.bounds(at, asked_length)
    seen = (key_at >= low) & (key_at <= high)

    shift = first_key(rows[:1] * 0) + columns - rows[:, None] + kernel - 1
    return Axis(query, key, answer, position // dilation - start[answer], kind, seen, shift.clamp(0, 2 * kernel - 2))
