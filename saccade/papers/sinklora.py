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

from typing import overload

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import affinity, attend
from saccade.ops.rotary import rotate_halves
from saccade.ops.sizes import ceil_div
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
        length = self.length(count)
        shift = ceil_div(length, 2)
        back = length // 2 if self.cyclic and not self.sinks else shift
        shifts = [(slice(half), 0, 0)] * (half > 0) + [(slice(half, None), shift, back)]
        mixed, seen = zip(*(self.in_runs(q[:, here], k[:, here], v[:, here], shift, back)
                            for here, shift, back in shifts), strict=True)
        out = torch.cat(mixed, 2)  # (B, N, heads, d)
        watched = [weights for weights in seen if weights is not None]
        affinities = torch.cat(watched, 1) if watched else None
        if self.sinks and not self.causal:
            first = q[:, :, : self.sinks]
            if affinities is None:
                whole = attend(first, k, v)
            else:
                weights = (first * first.shape[-1] ** -0.5 @ k.mT).softmax(-1)
                whole, affinities = weights @ v, torch.cat([weights, affinities[:, :, self.sinks :]], 2)
            out = torch.cat([whole.transpose(1, 2), out[:, self.sinks :]], 1)
        if affinities is not None:
            note(affinities, lambda: global_tokens(count, x.device))
        return split(self.proj(out.flatten(2)), x, prefix)

    def length(self, count: int) -> int:
        """Tokens a run, of a sequence of `count`."""
        return max(count // self.groups, 1)

    def in_runs(self, q: Tensor, k: Tensor, v: Tensor, shift: int, back: int) -> tuple[Tensor, Tensor | None]:
        """(B, N, h, d) of the runs that begin at token `shift` and are moved back by `back`; where someone watches,
        the weights (B, h, N, N) too.
        """
        B, heads, count, _ = q.shape
        length, sinks = self.length(count), min(self.sinks, count)
        numbers = runs(count, length, shift, q.device)
        bias, keys = run_bias(count, length, shift, sinks, self.causal, self.cyclic, q.dtype, q.device)
        into = numbers.clamp(min=0).flatten()
        q, in_run_k, in_run_v = (each.transpose(1, 2).index_select(1, into).unflatten(1, numbers.shape)
                                 for each in (q, k, v))  # (B, G, length, h, d)
        k, v = (torch.cat([each[:, :, :sinks].transpose(1, 2)[:, None].expand(-1, len(numbers), -1, -1, -1), run], 2)
                for each, run in ((k, in_run_k), (v, in_run_v)))
        q, k, v = (each.flatten(0, 1).transpose(1, 2) for each in (q, k, v))
        bias = bias[:, None].repeat(B, 1, 1, 1)
        places = (torch.arange(count, device=q.device) - back) % count
        if not recording():
            return self.laid_out(attend(q, k, v, bias), B, places), None
        weights = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)
        rows = self.laid_out(weights, B, places).transpose(1, 2)  # (B, h, N, S + length)
        columns = keys.where(keys >= 0, count).repeat_interleave(length, 0)[places].expand_as(rows)
        dense = torch.zeros(B, heads, count, count + 1, dtype=rows.dtype, device=rows.device)
        return self.laid_out(weights @ v, B, places), dense.scatter_add(3, columns, rows)[..., :count]

    @staticmethod
    def laid_out(runs: Tensor, batch: int, places: Tensor) -> Tensor:
        """(B G, h, length, n) of all runs as (B, N, h, n), in the order of the tokens."""
        return runs.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2).index_select(1, places)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: N C for each output of the layers, 2 C for each query and key of runs and sinks, and, unless
        causal, of the sinks and all tokens.
        """
        tokens = torch.Size(grid).numel() + prefix
        length, sinks = self.length(tokens), min(self.sinks, tokens)
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
