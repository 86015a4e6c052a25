"""SinkLoRA: long sequences in runs of tokens, half of the heads half a run further, and first tokens that all share.

Language models are tuned to longer texts by LongLoRA's shifted sparse attention: a sequence is cut into runs, tokens
attend in their own, and half of the heads see runs shifted by half of one, so that neighbouring runs meet. Its shift is
cyclic and lets the last tokens meet the first; and runs hide the first tokens, on which softmax attention leaves
whatever weight it has no use for (attention sinks). Sink fixed attention returns the wrapped half runs to their own
sides, and gives every query the sinks beside its run, the sinks all tokens,
    out_i = sum over j in sinks and run(i) of softmax_j(q_i k_j / sqrt(d)) v_j.
In use, a cache keeps of all past keys only the most recent and those that gathered most attention (`HeavyHitterCache`).

Zhang, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", 2024; shifted
sparse attention is Chen et al., "LongLoRA", 2023, the cache Zhang et al., "H2O: Heavy-Hitter Oracle", 2023.

Any grid: tokens are numbered row by row, prefix first; the last run may be shorter (where the authors' code refuses).
Quirks kept, with `cyclic` and without sinks, which is all that the published code holds: causal heads see across the
wrap, and of runs of an odd length the shifted heads' outputs return to the token before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import affinity, attend
from saccade.ops.rotary import rotate_halves
from saccade.ops.sizes import ceil_div, larger, smaller
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.tokens import causal, global_tokens, join, split

CARD = Card(
    "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    authors="Zhang",
    year=2024,
    systems=("sinklora",),
    arxiv="2406.05678",
    code="Dexter-GT-86/SinkLoRA@a741094",
    licence="Apache-2.0",
    read="abstract, code",
    keywords="sink fixed attention, SF-Attn, shifted sparse attention, LongLoRA, attention sinks, long context, "
             "heavy-hitter oracle, H2O, key-value cache",
    kinds=("mixer",),
    mixers={"sink_fixed_attention": "SinkFixedAttention"},
    goldens=("op_sinklora_s2_attn",),
    tests=("tests/papers/test_sinklora.py",),
)


@table
def runs(count: int, length: int, shift: int, device: torch.device) -> Tensor:
    """(G, length) token numbers of the runs of a sequence that begins at token `shift`; -1 behind its end."""
    place = torch.arange(ceil_div(count, length) * length, device=device)
    return torch.where(place < count, (place + shift) % count, -1).view(-1, length)


@table
def run_bias(
    count: int, length: int, shift: int, sinks: int, is_causal: bool, cyclic: bool, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What queries of each run add to the scores of sinks and run, (G, length, S + length), and the keys' numbers.

    Sinks are seen once, not again in their run; numbers (G, S + length) are -1 where a key is never seen.
    """
    numbers = runs(count, length, shift, device)
    first = torch.arange(sinks, device=device).expand(len(numbers), -1)
    keys = torch.cat([first, numbers.masked_fill(numbers < sinks, -1)], 1)
    query, key = numbers[:, :, None], keys[:, None]
    seen = (key >= 0).expand(-1, length, -1)
    if not cyclic:
        seen = seen & ((key < sinks) | ((query < shift) == (key < shift)))  # the first tokens come behind the last
    if is_causal and cyclic:
        place = torch.arange(length, device=device)
        seen = seen & torch.cat([key[..., :sinks] <= query, (place <= place[:, None]).expand(len(numbers), -1, -1)], -1)
    elif is_causal:
        seen = seen & (key <= query)
    seen = seen | (query < 0)  # padding sees anything, else its softmax would have no weight to give
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf), keys


class Runs(NamedTuple):
    """Queries (B G, h, length, d), keys and values (B G, h, S + length, d) of G runs, their bias, the keys' numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    keys: Tensor
    batch: int
    tokens: int
    back: int

    def laid_out(self, x: Tensor) -> Tensor:
        """(B G, h, length, n) of all runs as (B, N, h, n), in the order of the tokens."""
        places = (torch.arange(self.tokens, device=x.device) - self.back) % self.tokens
        return x.transpose(1, 2).unflatten(0, (self.batch, -1)).flatten(1, 2).index_select(1, places)

    def columns(self, heads: int) -> Tensor:
        """(B, h, N, S + length): the number of each token's keys, N for those that it never sees."""
        keys = self.keys.where(self.keys >= 0, self.tokens)[None, None].expand(self.batch, heads, -1, -1)
        keys = keys.repeat_interleave(self.q.shape[2], 2).unflatten(2, (len(self.keys), -1))
        return self.laid_out(keys.transpose(1, 2).flatten(0, 1)).transpose(1, 2)

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of runs as those of all pairs of tokens, (B, h, N, N)."""
        rows = self.laid_out(weights).transpose(1, 2)
        dense = rows.new_zeros(*rows.shape[:3], self.tokens + 1)
        return dense.scatter_add(3, self.columns(rows.shape[1]), rows)[..., : self.tokens]

    def collected(self, dense: Tensor) -> Tensor:
        """The weights of runs again, of those of all pairs."""
        rows = F.pad(dense, (0, 1)).gather(3, self.columns(dense.shape[1]))
        number = (torch.arange(self.keys.shape[0] * self.q.shape[2], device=rows.device) + self.back) % self.tokens
        rows = rows.index_select(2, number).unflatten(2, (len(self.keys), -1))
        return rows.transpose(1, 2).flatten(0, 1)


def softmax_weights(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)


class SinkFixedAttention(nn.Module):
    """Attention in runs of 1 / `groups` of the sequence, and to its first `sinks` tokens: (B, *grid, C) -> the same.

    The second half of the heads sees runs that begin half a run later; the half runs at both ends stay apart, unless
    the shift is `cyclic`. `causal` tokens see none after them. `rotary` is the base of rotary positions (10000 in
    LLaMA), `kv_heads` how many heads have keys and values of their own. LongLoRA's is sinks=0, cyclic=True.
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) in runs, shifted in half of the heads, and to sinks", "softmax", "sum of v")

    def __init__(
        self, site: Site, groups: int = 4, sinks: int = 4, causal: bool = False, cyclic: bool = False,
        rotary: float | None = None, kv_heads: int | None = None, bias: bool = False,
    ) -> None:
        super().__init__()
        width = check_heads(site)
        self.kv_heads = site.heads if kv_heads is None else kv_heads
        if site.heads % self.kv_heads:
            raise SaccadeError(f"kv_heads={kv_heads} does not divide {site.heads} heads; choose a divisor")
        if groups < 1 or sinks < 0:
            raise SaccadeError(f"groups={groups}, sinks={sinks}: give 1 run or more, and 0 sinks or more")
        self.heads, self.groups, self.sinks, self.causal, self.cyclic = site.heads, groups, sinks, causal, cyclic
        self.rotary = rotary
        self.qkv = nn.Linear(site.dim, site.dim + 2 * self.kv_heads * width, bias=bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=bias)

    @overload
    def forward(self, x: Tensor, prefix: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = join(x, prefix)
        count, half = tokens.shape[1], self.heads // 2
        qkv = self.qkv(tokens).unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)  # (B, h, N, d)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.rotary is not None:
            q, k = (rotate_halves(each, each.shape[-1], self.rotary) for each in (q, k))
        if self.kv_heads < self.heads:
            k, v = (each.repeat_interleave(self.heads // self.kv_heads, 1) for each in (k, v))
        length, shift = self.length(count), ceil_div(self.length(count), 2)
        back = length // 2 if self.cyclic and not self.sinks else shift
        sides = [(slice(half), 0, 0)] * (half > 0) + [(slice(half, None), shift, back)]
        parts = [self.in_runs(q[:, heads], k[:, heads], v[:, heads], shift, back) for heads, shift, back in sides]
        first = q[:, :, : self.sinks] if self.sinks and not self.causal else None
        if recording():
            out = self.watched(parts, first, k, v)
        else:
            out = torch.cat([part.laid_out(attend(part.q, part.k, part.v, part.bias)) for part in parts], 2)
            if first is not None:
                out = torch.cat([attend(first, k, v).transpose(1, 2), out[:, self.sinks :]], 1)
        return split(self.proj(out.flatten(2)), x, prefix)

    def length(self, count: int) -> int:
        """Tokens a run, of a sequence of `count`."""
        return larger(count // self.groups, 1)

    def first(self, count: int) -> int:
        """How many sinks a sequence of `count` has."""
        return smaller(self.sinks, count)

    def in_runs(self, q: Tensor, k: Tensor, v: Tensor, shift: int, back: int) -> Runs:
        """Heads (B, h, N, d) cut into runs that begin at token `shift`; outputs go to the token `back` before."""
        batch, _, count, _ = q.shape
        length, sinks = self.length(count), self.first(count)
        numbers = runs(count, length, shift, q.device)
        bias, keys = run_bias(count, length, shift, sinks, self.causal, self.cyclic, q.dtype, q.device)
        into = numbers.clamp(min=0).flatten()
        q, in_run_k, in_run_v = (each.transpose(1, 2).index_select(1, into).unflatten(1, numbers.shape)
                                 for each in (q, k, v))  # (B, G, length, h, d)
        k, v = (torch.cat([each[:, :, :sinks].transpose(1, 2)[:, None].expand(-1, len(numbers), -1, -1, -1), run], 2)
                for each, run in ((k, in_run_k), (v, in_run_v)))
        q, k, v = (each.flatten(0, 1).transpose(1, 2) for each in (q, k, v))
        return Runs(q, k, v, bias[:, None].repeat(batch, 1, 1, 1), keys, batch, count, back)

    def watched(self, parts: Sequence[Runs], first: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """The output (B, N, h, d) by way of the weights of all pairs of tokens, which a watcher may change."""
        dense = torch.cat([part.spread(softmax_weights(part.q, part.k, part.bias)) for part in parts], 1)
        if first is not None:
            dense = torch.cat([softmax_weights(first, k), dense[:, :, self.sinks :]], 2)
        dense = note(dense, lambda: global_tokens(dense.shape[2], dense.device))
        half = parts[0].q.shape[1] if len(parts) > 1 else 0
        shares = (dense[:, :half], dense[:, half:]) if half else (dense,)
        out = torch.cat([part.laid_out(part.collected(share) @ part.v)
                         for part, share in zip(parts, shares, strict=True)], 2)
        if first is None:
            return out
        return torch.cat([(dense[:, :, : self.sinks] @ v).transpose(1, 2), out[:, self.sinks :]], 1)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: N C for each output of the layers, 2 C for each query and key of runs and sinks, and, unless
        causal, of the sinks and all tokens.
        """
        tokens = torch.Size(grid).numel() + prefix
        length, sinks = self.length(tokens), self.first(tokens)
        pairs = ceil_div(tokens, length) * length * (sinks + length) + (0 if self.causal else sinks * tokens)
        return tokens * (self.qkv.weight.numel() + self.proj.weight.numel()) + 2 * pairs * site.dim

    def reach(self, site: Site) -> tuple[int, ...] | None:
        """All tokens, through the sinks; without, those of a run, on maps whole rows."""
        length = self.length(torch.Size(site.grid).numel())
        if self.sinks:
            return None
        rows = ceil_div(length - 1, torch.Size(site.grid[1:]).numel())
        across = tuple(side - 1 if length > 1 else 0 for side in site.grid)
        return across if self.cyclic else (min(rows, site.grid[0] - 1), *across[1:])


class HeavyHitterCache:
    """Keys and values of the past of which the `heavy` most attended and the `recent` latest stay, a head each.

    `attend(q, k, v)` takes the next tokens (B, heads, T, d), whose positions are in q and k already, and gives what
    they see of what was kept and of each other. How much a key is attended is the sum of its weights in all steps
    until now. (Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    2023.)
    """

    def __init__(self, heavy: int, recent: int) -> None:
        if heavy < 0 or recent < 1:
            raise SaccadeError(f"heavy={heavy}, recent={recent}: give 0 or more, and 1 or more")
        self.heavy, self.recent = heavy, recent
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.received: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, T, e) of the next T tokens, which enter the cache."""
        received, fresh = k.new_zeros(k.shape[:-1]), k.shape[2]
        if self.keys is not None and self.values is not None and self.received is not None:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            received = torch.cat([self.received, received], 2)
        bias = torch.cat([q.new_zeros(fresh, k.shape[2] - fresh), causal(fresh, q.device, q.dtype)], 1)
        weights = affinity(q, k, bias)
        received = received + weights.detach().sum(2)
        self.keys, self.values, self.received = self.kept(k, v, received)
        return weights @ v

    def kept(self, k: Tensor, v: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stays, in the order of the tokens."""
        old = k.shape[2] - self.recent
        if old <= self.heavy:
            return k, v, received
        heaviest = received[..., :old].topk(self.heavy, -1).indices.sort(-1).values
        latest = torch.arange(old, k.shape[2], device=k.device).expand(*received.shape[:2], -1)
        stays = torch.cat([heaviest, latest], -1)
        k, v = (each.gather(2, stays[..., None].expand(-1, -1, -1, each.shape[-1])) for each in (k, v))
        return k, v, received.gather(2, stays)


AUTHORS: KeyMap = (
    *((rf"{name}_proj\.(.*)", rf"qkv.\1#{piece}") for piece, name in enumerate("qkv")),
    (r"o_proj\.(.*)", r"proj.\1"),
)
