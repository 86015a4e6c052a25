"""Union of Experts: one Transformer cut into experts along its heads and hidden units, and every token chooses some.

A gate g = softmax(x W + b) sends each token to its `top` experts. Selective multi-head attention gives every expert one
head: it attends among the tokens that chose it,
    out_i = sum_{e chosen by i} softmax_j(q_i^e . k_j^e / sqrt(d)) v_j^e W_e + b_e      over j that chose e,
and the union of MLP experts gives each a slice of the hidden units of a gated MLP,
    out_i = (sum_e g_ie) sum_{e chosen by i} (silu(x_i A_e) * x_i B_e) C_e + c_e.

Yang, Lian, Li, "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer", 2025,
sections 3 and 4.

Any grid: tokens in row-major order are the sequence whose numbers turn half of each head's channels.
Quirks kept: experts have places for as many tokens as the most chosen one has; free places go to the first tokens that
chose others, which count as if they had chosen. The authors count the places over the whole batch (`batched`); by
default every image has its own, as theirs has when it comes alone. Positions turn the input itself, before the gate.
The gate of the attention multiplies nothing, so no gradient reaches it, and two norms are never used.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.tokens import global_tokens

CARD = Card(
    "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
    authors="Yang, Lian, Li",
    year=2025,
    systems=("union_of_experts",),
    arxiv="2503.02495",
    code="YujiaoYang-work/UoE@5f2306b",
    keywords="mixture of experts, union of experts, selective multi-head attention, SMHA, UoME, routing",
    kinds=("mixer",),
    mixers={"selective_attention": "SelectiveAttention"},
    goldens=("op_uoe_smha", "op_uoe_uome"),
    tests=("tests/papers/test_union_of_experts.py",),
)


@table
def turns(tokens: int, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, 1, pairs, 2) cosine and sine of n 10000^(-i / pairs) for the i-th pair of the n-th token."""
    angle = torch.arange(tokens, device=device)[:, None] * 10000 ** (-torch.arange(pairs, device=device) / pairs)
    return torch.stack([angle.cos(), angle.sin()], -1)[:, None].to(dtype)


def turn_half(x: Tensor, heads: int) -> Tensor:
    """Turn the second half of each head's channels of (B, N, C) by angles that grow with the token; put it first."""
    parts = x.unflatten(-1, (heads, -1))
    pairs = parts.shape[-1] // 4
    kept, turned = parts.split([parts.shape[-1] - 2 * pairs, 2 * pairs], -1)
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    cos, sin = turns(x.shape[1], pairs, x.device, x.dtype).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, kept], -1).flatten(-2)


class Router(nn.Module):
    """Which tokens every expert takes: x (B, N, C) -> taken (B, experts, N), bool, gates (B, N, experts), their sum.

    A token chooses the `top` experts of the largest softmax score; its gates are these scores over their sum S +
    epsilon, times `capacity`. Every expert takes as many tokens as the most chosen one, of its image or, `batched`, of
    all.
    """

    def __init__(self, dim: int, experts: int, top: int, capacity: float, epsilon: float, batched: bool) -> None:
        super().__init__()
        if not 1 <= top <= experts:
            raise SaccadeError(f"top={top} of {experts} experts: choose 1 to {experts}")
        self.top, self.capacity, self.epsilon, self.batched = top, capacity, epsilon, batched
        self.gate = nn.Linear(dim, experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        best = scores.topk(self.top, -1)
        whole = best.values.sum(-1, keepdim=True)
        gates = best.values / (whole + self.epsilon) * self.capacity
        # Not gates.sum: its gradient is the difference of two numbers that agree to one part in a million.
        total = self.capacity / (1 + self.epsilon / whole)
        gates = torch.zeros_like(scores).scatter(-1, best.indices, gates)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, True).transpose(1, 2)
        count = chosen.sum(-1, keepdim=True)
        places = count.amax(dim=(0, 1) if self.batched else 1, keepdim=True)
        return chosen | ((~chosen).cumsum(-1) <= places - count), gates, total


def packed(taken: Tensor) -> tuple[Tensor, Tensor | None]:
    """The numbers (B, experts, L) of the tokens that experts take, in order, and which are none (None: all are tokens).

    L is what the fullest expert takes; it depends on the data.
    """
    count = taken.sum(-1)
    length = int(count.max())
    tokens = taken.byte().sort(stable=True, dim=-1, descending=True).indices[..., :length]
    if bool((count == length).all()):
        return tokens, None
    return tokens, torch.arange(length, device=taken.device) >= count[..., None]


def static() -> bool:
    """Whether no size may depend on the data: every expert then reads all tokens, under a mask."""
    return recording() or torch.compiler.is_compiling()


def rows(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, C) at (B, experts, L) -> (B, experts, L, C)."""
    return x.gather(1, tokens.flatten(1)[..., None].expand(-1, -1, x.shape[-1])).unflatten(1, tokens.shape[1:])


def added(values: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The sum at each of `count` tokens of what experts give: (B, experts, L, C) -> (B, N, C)."""
    out = values.new_zeros(values.shape[0], count, values.shape[-1])
    return out.scatter_add(1, tokens.flatten(1)[..., None].expand(-1, -1, values.shape[-1]), values.flatten(1, 2))


class SelectiveAttention(nn.Module):
    """Attention of one head an expert among the tokens that the expert takes: (B, *grid, C) -> (B, *grid, C).

    As many experts as the site has heads; `top` defaults to half of them.
    """

    ranks, weights = (1, 2, 3), True
    template = Template(
        "q k^T / sqrt(d) among the tokens that an expert takes", "softmax; the router's chance", "sum of v"
    )

    def __init__(
        self, site: Site, top: int | None = None, capacity: float = 1.0, epsilon: float = 1e-6, batched: bool = False,
    ) -> None:
        super().__init__()
        width = check_heads(site)
        self.heads = site.heads
        self.router = Router(site.dim, site.heads, max(1, site.heads // 2) if top is None else top, capacity, epsilon,
                             batched)
        self.qkv = nn.Parameter(torch.empty(site.heads, site.dim, 3 * width))
        self.qkv_bias = nn.Parameter(torch.zeros(site.heads, 1, 3 * width))
        self.proj = nn.Parameter(torch.empty(site.heads, width, site.dim))
        self.proj_bias = nn.Parameter(torch.zeros(site.heads, site.dim))
        self.key_norm = nn.Parameter(torch.ones(width))  # in the authors' checkpoints, and never used
        self.norm = nn.LayerNorm(site.dim)
        for weight in (self.qkv, self.proj):
            nn.init.trunc_normal_(weight, std=site.dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        sequence = turn_half(x.flatten(1, -2), self.heads)
        count = sequence.shape[1]
        taken, *_ = self.router(sequence)
        if static():
            bias = torch.zeros_like(taken, dtype=x.dtype).masked_fill(~taken, -torch.inf)[:, :, None]
            heads = self.attend(sequence[:, None] @ self.qkv, bias)
            out = ((heads @ self.proj + self.proj_bias[:, None]) * taken[..., None]).sum(1)
            return out.view(x.shape)
        tokens, none = packed(taken)
        mask = None if none is None else torch.zeros_like(none, dtype=x.dtype).masked_fill(none, -torch.inf)[:, :, None]
        out = self.attend(rows(sequence, tokens) @ self.qkv, mask) @ self.proj + self.proj_bias[:, None]
        if none is not None:
            out = out.masked_fill(none[..., None], 0)
        return added(out, tokens, count).view(x.shape)

    def attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """(B, experts, L, 3 d) -> (B, experts, L, d)."""
        q, k, v = (qkv + self.qkv_bias).chunk(3, -1)
        return attend(q, k, v, bias, where=lambda: global_tokens(q.shape[-2], q.device))

    def cost(self, site: Site, grid: tuple[int, ...], places: int | None = None) -> int:
        """Multiply-adds where experts take so many tokens each; by default all, as in a compiled or recorded forward.

        N C E of the gate; E L (4 C d + 2 L d) of E experts.
        """
        tokens, width = prod(grid), site.dim // self.heads
        places = tokens if places is None else places
        return tokens * site.dim * self.heads + self.heads * places * (4 * site.dim * width + 2 * places * width)

    def reach(self, site: Site) -> None:
        """Any two tokens may choose the same expert."""
        return None


class UnionOfMlps(nn.Module):
    """A gated MLP whose hidden units are cut into experts that tokens choose: (B, *grid, C) -> (B, *grid, C)."""

    def __init__(
        self, dim: int, hidden: int | None = None, experts: int = 4, top: int = 2, capacity: float = 1.0,
        epsilon: float = 1e-6, batched: bool = False,
    ) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        if hidden % experts:
            raise SaccadeError(f"{experts} experts do not divide {hidden} hidden units; choose a divisor")
        self.router = Router(dim, experts, top, capacity, epsilon, batched)
        self.enter = nn.Parameter(torch.empty(2, experts, dim, hidden // experts))  # of the gate and of what it weighs
        self.enter_bias = nn.Parameter(torch.zeros(2, experts, 1, hidden // experts))
        self.leave = nn.Parameter(torch.empty(experts, hidden // experts, dim))
        self.leave_bias = nn.Parameter(torch.zeros(experts, dim))
        nn.init.trunc_normal_(self.enter, std=dim**-0.5)
        nn.init.trunc_normal_(self.leave, std=hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.flatten(1, -2)
        taken, _, total = self.router(sequence)
        if static():
            out = (self.expert(sequence[:, None]) * taken[..., None]).sum(1)
        else:
            tokens, none = packed(taken)
            out = self.expert(rows(sequence, tokens))
            out = added(out if none is None else out.masked_fill(none[..., None], 0), tokens, sequence.shape[1])
        return (out * total).view(x.shape)

    def expert(self, x: Tensor) -> Tensor:
        """(B, experts or 1, L, C) -> (B, experts, L, C)."""
        gate, value = (x[:, None] @ self.enter + self.enter_bias).unbind(1)
        return (F.silu(gate) * value) @ self.leave + self.leave_bias[:, None]

    def cost(self, site: Site, grid: tuple[int, ...], places: int | None = None) -> int:
        """Multiply-adds where experts take so many tokens each (by default all)."""
        tokens, experts = prod(grid), self.enter.shape[1]
        places = tokens if places is None else places
        return tokens * site.dim * experts + places * (self.enter.numel() + self.leave.numel())


ATTENTION: KeyMap = (
    (r"switch_gate\.(.*)", r"router.gate.\1"),
    (r"W_qkv\.weight\.0", "qkv"),
    (r"W_qkv\.bias\.0", "qkv_bias"),
    (r"ff\.weight\.0", "proj"),
    (r"ff\.bias", "proj_bias"),
    (r"kv_norm\.weight", "key_norm"),
    (r"layer_norm\.(.*)", r"norm.\1"),
)


def _one(value: Tensor) -> Tensor:
    return value[None]


MLP: KeyMap = (
    (r"switch_gate\.(.*)", r"router.gate.\1"),
    *((rf"linear{number + 1}\.{theirs}\.0", f"{ours}#{number}", _one)
      for number in (0, 1) for theirs, ours in (("weight", "enter"), ("bias", "enter_bias"))),
    (r"linear3\.weight\.0", "leave"),
    (r"linear3\.bias", "leave_bias"),
)
