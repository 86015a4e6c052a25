"""Patterns on a numbered grid: which keys a query sees, and biases that depend on where both stand, as tables a token.

Where axes are independent (neighborhoods, windows, rings), what a query sees on one is a run of steps: its first key
and how many. So a pattern of N tokens is a few numbers a token, whatever its kernel, dilation, stride or shift; nothing
here is N x N unless it is asked to be (`written_out`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isqrt, prod

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.ops.neighborhood import Window
from saccade.ops.tables import table

# Rows of the tables of an axis. What one query sees on it: the keys 0 to COUNT - 1 steps after FIRST, around the RING
# where there is one. ORIGIN turns those steps to indices of a bias of SIDE; PLACE is what the axis adds to a token's
# number. Scores and masks read all numbers there: a kernel compiled for one pattern serves the next.
AT, FIRST, COUNT, ORIGIN, RING, SIDE, PLACE = range(7)
APART = 2**20  # between the numbers of two residue classes of an axis: farther than any two steps of one
Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """Which keys of a grid a query sees; tokens are numbered in row-major order. Settings are given one an axis."""

    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.grid):
                raise SaccadeError(f"{name} {value} on a grid of {len(self.grid)} axes: give one an axis")

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        """AT, FIRST, COUNT, ORIGIN and RING of the positions of an axis."""
        raise NotImplementedError

    def sides(self) -> tuple[int, ...]:
        """Sides of a bias over offsets key - query; the middle is no offset."""
        raise NotImplementedError

    def order(self, device: torch.device) -> Tensor | None:
        """An order of tokens in which those that see each other are near; None: they are."""
        return None

    @property
    def sees(self) -> Sees | None:
        """(tables, query numbers, key numbers) -> bool; None where all see all."""
        return _in_the_run


@dataclass(frozen=True)
class Everywhere(Pattern):
    """All tokens see all."""

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        at, size = torch.arange(self.grid[number], device=device), self.grid[number]
        return at, 0, size, size - 1 - at, 0

    def sides(self) -> tuple[int, ...]:
        return tuple(2 * size - 1 for size in self.grid)

    @property
    def sees(self) -> Sees | None:
        return None


@dataclass(frozen=True)
class Neighborhood(Pattern):
    """The windows of `ops.neighborhood`, moved inwards at the borders, dilated, strided, causal; one an axis."""

    windows: tuple[Window, ...]

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        size, window = self.grid[number], self.windows[number]
        if isinstance(size, int) and size < window.kernel * window.dilation:  # one left open would be a guard
            raise SaccadeError(f"axis of {size} under kernel {window.kernel} x dilation {window.dilation}: pad it to "
                               f"{window.kernel * window.dilation}")
        position = torch.arange(size, device=device)
        residue, step = position % window.dilation, position // window.dilation
        low, high = window.bounds(step, (size - residue + window.dilation - 1) // window.dilation)
        start = residue * APART
        return start + step, start + low, high - low + 1, low - step + window.kernel - 1, 0

    def sides(self) -> tuple[int, ...]:
        return tuple(2 * window.kernel - 1 for window in self.windows)

    def order(self, device: torch.device) -> Tensor | None:
        """Residue class by residue class: of those, only one is seen."""
        return _by_class(self.grid, tuple(window.dilation for window in self.windows), device)


@dataclass(frozen=True)
class Windows(Pattern):
    """Windows side by side, the first border at `shift`: what lies before it, and what is left at the end, is a
    smaller window (as Swin's masks cut its shifted windows).
    """

    window: tuple[int, ...]
    shift: tuple[int, ...]

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        size, side, shift = self.grid[number], self.window[number], self.shift[number]
        if not 0 <= shift < side:
            raise SaccadeError(f"shift {shift} of windows of {side}: give 0 to {side - 1}")
        at = torch.arange(size, device=device)
        begin = (at - shift) // side * side + shift
        first = begin.clamp(min=0)
        return at, first, (begin + side).clamp(max=size) - first, first - at + side - 1, 0

    def sides(self) -> tuple[int, ...]:
        return tuple(2 * side - 1 for side in self.window)


@dataclass(frozen=True)
class Ring(Pattern):
    """Neighborhoods on axes that close to rings (panoramas, textures): no border moves a window; an even kernel has one
    more position before the query.
    """

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        size, kernel, dilation = self.grid[number], self.kernel[number], self.dilation[number]
        classes = gcd(size, dilation)  # steps of `dilation` around the ring meet every classes-th position
        ring = size // classes
        if kernel > ring:
            raise SaccadeError(f"ring of {size} under kernel {kernel} x dilation {dilation}: it closes after {ring} "
                               f"steps; give a kernel of at most {ring}")
        residue, step = (part.flatten() for part in torch.meshgrid(
            torch.arange(classes, device=device), torch.arange(ring, device=device), indexing="ij"))
        position = (residue + step * dilation) % size
        at, first = torch.empty_like(position), torch.empty_like(position)
        at[position] = residue * APART + step
        first[position] = residue * APART + (step - kernel // 2) % ring
        return at, first, kernel, kernel - 1 - kernel // 2, ring

    def sides(self) -> tuple[int, ...]:
        return tuple(2 * kernel - 1 for kernel in self.kernel)

    def order(self, device: torch.device) -> Tensor | None:
        return _by_class(self.grid, tuple(map(gcd, self.grid, self.dilation)), device)


@dataclass(frozen=True)
class Disc(Pattern):
    """Keys whose squared distance is `square` at most: CLEAR's circular window w is w^2 - 1, LESS's perception field
    of radius r pixels on patches of p is floor((r / p)^2).
    """

    square: int

    def axis(self, number: int, device: torch.device) -> tuple[Tensor | int, ...]:
        at = torch.arange(self.grid[number], device=device)
        return at, 0, self.square, isqrt(self.square) - at, 0

    def sides(self) -> tuple[int, ...]:
        return (2 * isqrt(self.square) + 1,) * len(self.grid)

    @property
    def sees(self) -> Sees | None:
        return _in_the_disc


@dataclass(frozen=True)
class Paths:
    """A bias that fades along the bent path from query to key: -sum over axes of |c(here) - c(where the axis ends)|.

    `sums` has one tensor an axis of the grid, (B, heads, *grid): running sums, along that axis, of what each step
    costs, so the path mask of an image takes 2 N numbers a head instead of N^2. Axes are walked from the last to the
    first, or as `walk` says: on images (0, 1) bends at the other corner. (Zhao et al., "Polyline Path Masked
    Attention", 2025, section 3.2.)
    """

    sums: tuple[Tensor, ...]
    walk: tuple[int, ...] | None = None


Bias = Tensor | Paths


def check_bias(bias: Bias | None, heads: int, batch: int, pattern: Pattern) -> None:
    """Raise SaccadeError where a bias does not fit."""
    if isinstance(bias, Tensor) and bias.shape != (heads, *pattern.sides()):
        raise SaccadeError(f"bias of shape {tuple(bias.shape)}: give {(heads, *pattern.sides())}")
    if isinstance(bias, Paths):
        shapes, expected = [tuple(x.shape) for x in bias.sums], (batch, heads, *pattern.grid)
        if shapes != [expected] * len(pattern.grid):
            raise SaccadeError(f"sums of shapes {shapes}: give {len(pattern.grid)} of shape {expected}, one an axis")


@table
def token_tables(pattern: Pattern, device: torch.device) -> Tensor:
    """(axes, 7, N), a column a token."""
    N, axes = prod(pattern.grid), []
    for number, size in enumerate(pattern.grid):
        stride = prod(pattern.grid[number + 1:])
        position = torch.arange(N, device=device) // stride % size
        rows = [torch.as_tensor(row, device=device).expand(size)[position] for row in pattern.axis(number, device)]
        side = torch.full_like(position, pattern.sides()[number])
        axes.append(torch.stack([*rows, side, position * stride]))
    return torch.stack(axes).int()


def score_of(bias: Bias, tables: Tensor) -> Score:
    """(score, image, head, query, key) -> score + bias: of scalars (FlexAttention) as of tensors that broadcast."""
    return _by_offset(bias, tables) if isinstance(bias, Tensor) else _by_path(bias, tables)


def _in_the_run(tables: Tensor, i: Tensor, j: Tensor) -> Tensor:
    inside: Tensor | bool = True
    for axis in range(tables.shape[0]):
        steps = _steps(tables, axis, i, j)
        inside = inside & (steps >= 0) & (steps < tables[axis, COUNT][i])
    assert isinstance(inside, Tensor)
    return inside


def _in_the_disc(tables: Tensor, i: Tensor, j: Tensor) -> Tensor:
    square = sum((tables[axis, AT][j] - tables[axis, AT][i]) ** 2 for axis in range(tables.shape[0]))
    return square <= tables[0, COUNT][i]


def _steps(tables: Tensor, axis: int, i: Tensor, j: Tensor) -> Tensor:
    """Steps from the first key that i sees to j."""
    steps = tables[axis, AT][j] - tables[axis, FIRST][i]
    return torch.where(steps < 0, steps + tables[axis, RING][i], steps)


def _by_offset(bias: Tensor, tables: Tensor) -> Score:
    flat = bias.flatten(1)

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        index: Tensor | int = 0
        for axis in range(tables.shape[0]):
            side, offset = tables[axis, SIDE][i], _steps(tables, axis, i, j) + tables[axis, ORIGIN][i]
            index = index * side + offset.clamp(min=0).minimum(side - 1)  # keys that are not seen may be anywhere
        return score + flat[h, index]

    return score


def _by_path(paths: Paths, tables: Tensor) -> Score:
    walk = list(reversed(range(len(paths.sums)))) if paths.walk is None else list(paths.walk)
    place = tables[walk, PLACE]
    here = [paths.sums[axis].flatten(2) for axis in walk]
    there = [x.clone() for x in here]  # FlexAttention has no gradient yet of a tensor that is read in two places

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        token: Tensor | int = sum(place[step][i] for step in range(len(here)))
        for step in range(len(here)):
            corner = token + place[step][j] - place[step][i]
            score = score - (here[step][b, h, token] - there[step][b, h, corner]).abs()
            token = corner
        return score

    return score


def written_out(pattern: Pattern, bias: Bias | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Mask and bias as one tensor that broadcasts to (B, heads, N, N), -inf where a key is not seen; None for none."""
    mask = _mask(pattern, dtype, device)
    if bias is None:
        return mask
    score = score_of(bias, token_tables(pattern, device))
    images, heads = bias.sums[0].shape[:2] if isinstance(bias, Paths) else (1, len(bias))
    image, head = (torch.arange(size, device=device) for size in (images, heads))
    token = torch.arange(prod(pattern.grid), device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    whole = score(zero, image.view(-1, 1, 1, 1), head.view(-1, 1, 1), token[:, None], token).to(dtype)
    return whole if mask is None else whole + mask


@table
def _mask(pattern: Pattern, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if pattern.sees is None:
        return None
    token = torch.arange(prod(pattern.grid), device=device)
    seen = pattern.sees(token_tables(pattern, device), token[:, None], token)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


def _by_class(grid: tuple[int, ...], classes: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Tokens sorted by their residues on all axes, those of one class in row-major order; None for one class."""
    if max(classes) == 1:
        return None
    number, key = torch.arange(prod(grid), device=device), torch.zeros(prod(grid), dtype=torch.long, device=device)
    for axis, (size, modulus) in enumerate(zip(grid, classes, strict=True)):
        key = key * modulus + number // prod(grid[axis + 1:]) % size % modulus
    return key.argsort(stable=True)
