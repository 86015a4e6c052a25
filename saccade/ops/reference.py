"""The ops once more, slow and obvious: Python loops in float64, written to be read and to be tested against."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import exp, prod

import torch
from torch import Tensor


def neighbours(
    position: int, size: int, kernel: int, dilation: int, stride: int = 1, causal: bool = False
) -> list[int]:
    """The positions of an axis that `position` looks at, in order; an even kernel has one more before it.

    All of a group of `stride` look where its middle one does; on a causal axis, from `kernel` - 1 steps before the
    group's last one to themselves.
    """
    residue_class = list(range(position % dilation, size, dilation))
    step = residue_class.index(position)
    group = range(step - step % stride, step - step % stride + stride)
    if causal:
        last = min(group[-1], len(residue_class) - 1)
        return residue_class[max(0, last - kernel + 1) : step + 1]
    start = min(group[len(group) // 2], len(residue_class) - 1) - kernel // 2
    start = max(0, min(start, len(residue_class) - kernel))
    return residue_class[start : start + kernel]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] | None = None,
    causal: tuple[bool, ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """`saccade.ops.neighborhood.neighborhood_attention`, one query at a time: q, k, v, out (B, *S, h, d)."""
    batch, *grid, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(v.shape, dtype=torch.float64)
    for b, h, *i in product(range(batch), range(heads), *map(range, grid)):
        weights = {}
        axes = [neighbours(*axis) for axis in zip(i, grid, kernel, dilation, stride or (1,) * len(grid),
                                                  causal or (False,) * len(grid), strict=True)]
        for j in product(*axes):
            logit = scale * float(q[(b, *i, h)].double() @ k[(b, *j, h)].double())
            if bias is not None:
                steps = [(to - at) // step for to, at, step in zip(j, i, dilation, strict=True)]
                logit += float(bias[(h, *(step + size - 1 for step, size in zip(steps, kernel, strict=True)))])
            weights[j] = exp(logit)
        assert len(weights) == prod(kernel) or causal
        total = sum(weights.values())
        for j, weight in weights.items():
            out[(b, *i, h)] += weight / total * v[(b, *j, h)].double()
    return out


Place = tuple[int, ...]


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Place,
    sees: Callable[[Place, Place], bool],
    bias: Callable[[int, int, Place, Place], float] | None = None,
) -> Tensor:
    """`saccade.ops.flex.flex_attend`, pair by pair: q, k, v, out (B, h, N, d), `bias` of image, head and places."""
    places = list(product(*map(range, grid)))
    out = torch.zeros(v.shape, dtype=torch.float64)
    for b, h, (n, i) in product(range(q.shape[0]), range(q.shape[1]), enumerate(places)):
        weights = {}
        for m, j in enumerate(places):
            if sees(i, j):
                logit = q.shape[-1] ** -0.5 * float(q[b, h, n].double() @ k[b, h, m].double())
                weights[m] = exp(logit + (bias(b, h, i, j) if bias else 0))
        for m, weight in weights.items():
            out[b, h, n] += weight / sum(weights.values()) * v[b, h, m].double()
    return out


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`saccade.ops.scan.selective_scan`, token by token: u, dt, y (B, L, E), a (E, n), b, c (B, L, n)."""
    state = u.new_zeros(u.shape[0], *a.shape)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a)
        state = decay * state + (dt[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
        outputs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`saccade.ops.scan.ssd`, token by token and head by head: x, y (B, L, h, p), dt (B, L, h), b, c (B, L, g, n)."""
    heads, groups = x.shape[2], b.shape[2]
    y = torch.zeros_like(x)
    for image, head in product(range(x.shape[0]), range(heads)):
        group = head // (heads // groups)
        state = x.new_zeros(b.shape[-1], x.shape[-1])
        for t in range(x.shape[1]):
            taken_in = torch.outer(b[image, t, group], x[image, t, head])
            state = exp(float(dt[image, t, head] * a[head])) * state + dt[image, t, head] * taken_in
            y[image, t, head] = c[image, t, group] @ state
    return y
