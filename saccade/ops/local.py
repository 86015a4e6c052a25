"""Products of every token with the window of tokens around it, by shifts of the map: no copy of each window."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.record import recording
from saccade.ops.attend import in_cache
from saccade.ops.tables import table

TILE = 8  # tokens of a row whose scores are one matrix product, on the CPU in evaluation


def local_scores(q: Tensor, k: Tensor, window: int, dilation: int = 1) -> Tensor:
    """s[..., o] = q_i . k_{i + o} for the window^n offsets o around i, `dilation` steps apart.

    (B, *grid, h, d) twice -> (B, *grid, h, window^n). Offsets are in row-major order, positions outside the grid count
    as zeros. A matrix product over copied windows, with the same numbers, while `record` watches.
    """
    if q.shape[-1] >= TILE and in_cache(q):
        return _tiled_scores(q, k, window, dilation)
    shifts = _shifts(k, window, dilation)
    if recording():
        return (torch.stack(shifts, -2) @ q[..., None]).squeeze(-1)
    return torch.stack([(q * shift).sum(-1) for shift in shifts], -1)


def _tiled_scores(q: Tensor, k: Tensor, window: int, dilation: int) -> Tensor:
    """The same by matrix products: TILE tokens of a row with all that they see of a row, whose diagonals are read."""
    *leading, side = q.shape[1:-2]
    rest, reach = -side % TILE, (window - 1) * dilation
    q = F.pad(q, [0, 0, 0, 0, 0, rest]).unflatten(-3, (-1, TILE)).transpose(-3, -2)  # (B, *leading, tiles, h, TILE, d)
    margins = [reach // 2] * (2 * len(leading))
    k = F.pad(k, [0, 0, 0, 0, reach // 2, reach // 2 + rest, *margins]).unfold(-3, TILE + reach, TILE)
    k = k.contiguous()  # (B, *leading, tiles, h, d, TILE + reach), once for all offsets
    pieces = []
    for offset in product(range(0, window * dilation, dilation), repeat=len(leading)):
        at = k
        for axis, (start, length) in enumerate(zip(offset, leading, strict=True), 1):
            at = at.narrow(axis, start, length)
        every = F.pad((q @ at).flatten(-2), [0, TILE]).unflatten(-1, (TILE, -1))  # row i begins at its own token
        pieces.append(every[..., :window * dilation:dilation])
    scores = torch.cat(pieces, -1).transpose(-3, -2).flatten(-4, -3)  # (B, *leading, tiles x TILE, h, window^n)
    return scores.narrow(-3, 0, side)


def local_sum(weights: Tensor, v: Tensor, window: int, dilation: int = 1) -> Tensor:
    """out_i = sum_o weights[i, o] v_{i + o}: (B, *grid, h, window^n), (B, *grid, h, d) -> (B, *grid, h, d)."""
    shifts = _shifts(v, window, dilation)
    if recording():
        return (weights[..., None, :] @ torch.stack(shifts, -2)).squeeze(-2)
    first, *others = (weight[..., None] for weight in weights.unbind(-1))
    out = first * shifts[0]
    for weight, shift in zip(others, shifts[1:], strict=True):
        out = torch.addcmul(out, weight, shift) if torch.is_grad_enabled() else out.addcmul_(weight, shift)
    return out


def _shifts(x: Tensor, window: int, dilation: int) -> list[Tensor]:
    """The maps x_{i + o}, views of one zero-padded copy of (B, *grid, h, d)."""
    grid = x.shape[1:-2]
    padded = F.pad(x, [0, 0, 0, 0, *[window // 2 * dilation] * (2 * len(grid))])
    views = []
    for offset in product(range(0, window * dilation, dilation), repeat=len(grid)):
        view = padded
        for axis, (start, side) in enumerate(zip(offset, grid, strict=True)):
            view = view.narrow(axis + 1, start, side)
        views.append(view)
    return views


@table
def neighbour_tokens(grid: tuple[int, ...], window: int, device: torch.device, dilation: int = 1) -> Tensor:
    """(N, window^n) number of the token at each offset around each token; -1 outside the grid."""
    numbers = torch.arange(prod(grid), device=device).view(1, *grid, 1, 1) + 1
    around = torch.stack(_shifts(numbers, window, dilation), -1) - 1
    return around.view(prod(grid), window ** len(grid))
