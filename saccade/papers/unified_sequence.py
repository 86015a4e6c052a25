"""One template for models of long sequences, and attention over a context that no machine holds alone.

Every token mixer is out_i = sum_j P_ij v_j; they differ in where P comes from, what normalises it and what is summed
(`mixer.template`, and `docs/mixers.md` for all of ours). Of them softmax attention is the one that has to be spread:
worker r of R keeps its own queries, keys and values; keys and values go round, and each worker folds every block that
comes into running sums, whose order does not matter,
    m' = max(m, max_j s_ij),  l' = l e^(m - m') + sum_j e^(s_ij - m'),  o' = o e^(m - m') + sum_j e^(s_ij - m') v_j,
and o / l at the end is the attention of one machine, exactly. The backward pass sends them round again, with their
gradients, and makes the weights anew from m + log l.

Hong, Mao, Ma, Wang, Gan, "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies", 2023;
the running sums are Rabe, Staats, "Self-attention Does Not Need O(n^2) Memory", 2021.

Each worker holds 1 / R of everything, and sends 2 (R - 1) N C / R numbers forward. Shards may differ in length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import SaccadeError

CARD = Card(
    "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
    authors="Hong, Mao, Ma, Wang, Gan",
    year=2023,
    systems=("unified_sequence",),
    arxiv="2302.06218",
    read="abstract",
    keywords="long sequences, unified template, token mixing, distributed attention, ring attention, blockwise",
    kinds=("sequence",),
    tests=("tests/papers/test_unified_sequence.py", "tests/tools/test_templates.py"),
)


class Sums(NamedTuple):
    """Running sums of softmax attention, in float32 or better: o (B, h, N, e), m and l (B, h, N, 1)."""

    out: Tensor
    largest: Tensor
    total: Tensor


def empty(q: Tensor, v: Tensor) -> Sums:
    """Of no keys yet."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=wide, device=q.device)
    return Sums(out, torch.full_like(out[..., :1], -torch.inf), torch.zeros_like(out[..., :1]))


def fold(sums: Sums, q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None) -> Sums:
    """The sums with the keys and values of one more block; `hidden` (N, M) bool are keys that a query must not see."""
    scores = (q @ k.mT).to(sums.out.dtype) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    largest = torch.maximum(sums.largest, scores.amax(-1, keepdim=True))
    base = largest.masked_fill(largest == -torch.inf, 0)  # a query that has seen nothing yet
    kept, weights = (sums.largest - base).exp(), (scores - base).exp()
    return Sums(sums.out * kept + weights @ v.to(weights.dtype), largest,
                sums.total * kept + weights.sum(-1, keepdim=True))


def finish(sums: Sums) -> tuple[Tensor, Tensor]:
    """The attention o / l, and log sum_j e^s_ij, (B, h, N, 1)."""
    return sums.out / sums.total, sums.largest + sums.total.log()


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v on one machine, `block` keys at a time: memory linear in N. Shapes as for `ops.attend`."""
    if block < 1:
        raise SaccadeError(f"block={block}: give 1 key or more")
    sums = empty(q, v)
    for keys, values in zip(k.split(block, 2), v.split(block, 2), strict=True):
        sums = fold(sums, q, keys, values, q.shape[-1] ** -0.5 if scale is None else scale)
    return finish(sums)[0].to(v.dtype)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, group: Any = None
) -> Tensor:
    """softmax(scale q k^T) v over the shards of all workers of a process group: this worker's rows, (B, h, N_r, e).

    q, k, v (B, h, N_r, d) are this worker's part of the sequence, in the order of the ranks; parts may differ in
    length. `causal` hides later tokens, and blocks that are hidden whole are not computed. Differentiable. Without an
    initialised process group this worker is the only one.
    """
    attended: Tensor = _Ring.apply(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, group)
    return attended


class _Circle:
    """Where this worker stands, and how blocks go round."""

    def __init__(self, tokens: int, device: torch.device, group: Any) -> None:
        self.group, self.alone = group, not (dist.is_available() and dist.is_initialized())
        self.rank, self.workers = (0, 1) if self.alone else (dist.get_rank(group), dist.get_world_size(group))
        self.lengths = [tokens]
        if self.workers > 1:
            counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(self.workers)]
            dist.all_gather(counts, torch.tensor([tokens], device=device), group=group)
            self.lengths = [int(count) for count in counts]

    def start(self, worker: int) -> int:
        """Number of the first token of a worker."""
        return sum(self.lengths[:worker])

    def hidden(self, owner: int, device: torch.device) -> Tensor | None:
        """Keys of `owner` that come after this worker's queries, (N_r, M) bool; None where none does."""
        if owner < self.rank:
            return None
        mine = torch.arange(self.lengths[self.rank], device=device) + self.start(self.rank)
        theirs = torch.arange(self.lengths[owner], device=device) + self.start(owner)
        return theirs > mine[:, None]

    def onward(self, blocks: list[Tensor], owner: int) -> list[Tensor]:
        """Give blocks to the worker before, take those of the next: they belong to `owner`."""
        if self.workers == 1:
            return blocks
        group: Any = self.group or dist.group.WORLD
        before, after = (dist.get_global_rank(group, (self.rank + step) % self.workers) for step in (-1, 1))
        taken = [block.new_empty(*block.shape[:2], self.lengths[owner], block.shape[3]) for block in blocks]
        sends = [dist.P2POp(dist.isend, block.contiguous(), before, self.group) for block in blocks]
        takes = [dist.P2POp(dist.irecv, block, after, self.group) for block in taken]
        for work in dist.batch_isend_irecv(sends + takes):
            work.wait()
        return taken


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, group: Any) -> Tensor:
        circle = _Circle(q.shape[2], q.device, group)
        sums, blocks = empty(q, v), [k, v]
        for step in range(circle.workers):
            owner = (circle.rank + step) % circle.workers
            if step:
                blocks = circle.onward(blocks, owner)
            if not causal or owner <= circle.rank:
                hidden = circle.hidden(owner, q.device) if causal else None
                sums = fold(sums, q, blocks[0], blocks[1], scale, hidden)
        out, spread = finish(sums)
        ctx.circle, ctx.causal, ctx.scale = circle, causal, scale
        ctx.save_for_backward(q, k, v, out, spread)
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, spread = ctx.saved_tensors
        circle, wide = ctx.circle, out.dtype
        q_wide, slope = q.to(wide), slope.to(wide)
        shared = (slope * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q_wide)
        blocks = [k.to(wide), v.to(wide), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)]
        for step in range(circle.workers):
            owner = (circle.rank + step) % circle.workers
            if step:
                blocks = circle.onward(blocks, owner)
            if ctx.causal and owner > circle.rank:
                continue
            keys, values, d_k, d_v = blocks
            scores = q_wide @ keys.mT * ctx.scale
            hidden = circle.hidden(owner, q.device) if ctx.causal else None
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            weights = (scores - spread).exp()
            d_scores = weights * (slope @ values.mT - shared) * ctx.scale
            d_q += d_scores @ keys
            blocks = [keys, values, d_k + d_scores.mT @ q_wide, d_v + weights.mT @ slope]
        _, _, d_k, d_v = circle.onward(blocks, circle.rank)  # one step more, and they are home
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None
