"""Attention in a pattern of a grid: by FlexAttention where a GPU compiles it, else under a mask.

    out = flex_attend(q, k, v, Neighborhood((56, 56), (Window(7, 2), Window(7, 2))), bias)
    out = flex_attend(q, k, v, Everywhere((14, 14)), Paths((columns, rows)))

FlexAttention computes no block of 128 x 128 pairs in which nobody sees anybody, and never writes down N x N numbers: it
reads the pattern's tables. One compiled kernel serves all grids, kernel sizes, dilations, strides and shifts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from saccade.core.errors import SaccadeError
from saccade.ops.attend import attend
from saccade.ops.choice import Case, choose, to_choose
from saccade.ops.pattern import Bias, Paths, Pattern, check_bias, score_of, token_tables, written_out
from saccade.ops.tables import table

BLOCK = 128  # tokens a side of what is computed or left out as a whole
RECOMPILES = 256  # kernels kept, by type, heads, kind of bias, on a CPU also shape; at torch's 8 a call would fail


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Bias | None = None, *, scale: float | None = None
) -> Tensor:
    """out_i = sum over the j that i sees in `pattern` of softmax_j(scale q_i . k_j + bias(i, j)) v_j.

    q, k, v, out (B, h, N, d), N the tokens of `pattern.grid` in row-major order. A tensor bias (h, *pattern.sides()) is
    indexed by offset (key - query, in steps of the dilation) from its middle. scale defaults to d^-1/2. Raises
    SaccadeError where shapes disagree. While compiling, exporting, counting or recording: `attend` under a whole mask.
    """
    N = prod(pattern.grid)
    if any(x.dim() != 4 or x.shape[:3] != (*q.shape[:2], N) for x in (q, k, v)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise SaccadeError(f"q, k, v of shapes {shapes}: give all three as (B, heads, {N}, d) for grid {pattern.grid}")
    check_bias(bias, q.shape[1], q.shape[0], pattern)
    if to_choose(q) and choose(_case(q, k, v, pattern, bias)).path == "flex":
        return flex_kernel(q, k, v, pattern, bias, scale)

    def where() -> tuple[Tensor, Tensor]:
        tokens = torch.arange(N, device=q.device)[None]
        return tokens, tokens

    return attend(q, k, v, written_out(pattern, bias, q.dtype, q.device), where=where, scale=scale)


def flex_kernel(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Bias | None = None, scale: float | None = None
) -> Tensor:
    """`flex_attend`, by FlexAttention, whatever the case."""
    device = q.device
    order, back = _orders(pattern, device)
    if order is not None:
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
    score = None if bias is None else score_of(bias, _tables(pattern, device))
    out = _compiled(device.type)(q, k, v, score_mod=score, block_mask=_block_mask(pattern, device), scale=scale)
    return out if back is None else out.index_select(2, back)


def _case(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Bias | None) -> Case:
    leaves = [q, k, v, *(bias.sums if isinstance(bias, Paths) else [] if bias is None else [bias])]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    return Case("pattern", q.device.type, q.dtype, pattern.grid, q.shape[1], q.shape[-1], q.shape[0], bias is not None,
                training, repr(pattern))


@lru_cache(maxsize=2)
def _compiled(device: str) -> Callable[..., Tensor]:
    # Sizes are left open from the second one on, but on a CPU, whose kernel does not build so. The graph is whole: one
    # that fell back to FlexAttention's uncompiled form would write down the N x N scores without a word.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch._dynamo.config.patch(cache_size_limit=RECOMPILES):
            return compiled(*args, **kwargs)

    return run


@table
def _orders(pattern: Pattern, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The pattern's order of tokens, and the way back."""
    order = pattern.order(device)
    return order, None if order is None else order.argsort()


@table
def _tables(pattern: Pattern, device: torch.device) -> Tensor:
    """The pattern's tables, in its order."""
    tables, (order, _) = token_tables(pattern, device), _orders(pattern, device)
    return tables if order is None else tables[..., order]


@table
def _block_mask(pattern: Pattern, device: torch.device) -> BlockMask | None:
    """Which blocks have a pair that sees, and which of them have no other; found one row of blocks at a time."""
    sees = pattern.sees
    if sees is None:
        return None
    tables, N = _tables(pattern, device), prod(pattern.grid)
    blocks = -(-N // BLOCK)
    token, some, every = torch.arange(N, device=device), [], []
    for queries in token.split(BLOCK):
        seen = torch.zeros(BLOCK, blocks * BLOCK, dtype=torch.bool, device=device)
        seen[:len(queries), :N] = sees(tables, queries[:, None], token)
        seen = seen.view(BLOCK, blocks, BLOCK)
        some.append(seen.any(2).any(0))
        every.append(seen.all(2).all(0))
    full = torch.stack(every)
    part = torch.stack(some) & ~full

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(tables, i, j)

    return BlockMask.from_kv_blocks(*_sparse(part), *_sparse(full), BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(N, N))


def _sparse(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are meant, and their numbers before all others: (1, 1, Q), (1, 1, Q, K)."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]
