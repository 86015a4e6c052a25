"""MoH: heads are experts, and every token chooses and weighs its own.

A multi-head attention is a sum over heads; MoH gives each term a gate g_h of the token,
    out = sum_h g_h H_h W_h,   g = a_1 S softmax(x W_s) for S shared heads, a_2 R top_R(softmax(x W_r)) for the rest,
with (a_1, a_2) = 2 softmax(x W_0) and top_R keeping the R largest, which then sum to one. Tokens take R of the routed
heads; a loss keeps their use even. The vision model puts the gates in TransNeXt's two attentions.

Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, section 3.

Any grid: see TransNeXt. Quirks kept: a single shared head has no gate of its own (1); without routed heads only the
shared gates exist; all heads are computed and the gates of those not chosen are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import create_model, hybrid_mixer
from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone
from saccade.core.keymap import KeyMap, pvt_names, within
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.aggregated import NAMES, AggregatedAttention, CosineAttention

_PUBLISHED = ("moh_vit_s_80", "moh_vit_s_75", "moh_vit_b_75", "moh_vit_b_50")

CARD = Card(
    "MoH: Multi-Head Attention as Mixture-of-Head Attention",
    authors="Jin, Zhu, Yuan, Yan",
    year=2024,
    systems=("moh",),
    arxiv="2410.11842",
    code="SkyworkAI/MoH@2cefd57",
    licence="Apache-2.0",
    read="paper, code",
    keywords="mixture of heads, mixture of experts, routing, shared heads, load balance loss",
    kinds=("backbone", "mixer"),
    mixers={"mixture_of_head": "MixtureOfHead", "aggregated_mixture_of_head": "AggregatedMixtureOfHead"},
    params=dict(zip(_PUBLISHED, (50e6, 50e6, 90e6, 90e6), strict=True)),
    top1=dict(zip(_PUBLISHED, (84.7, 84.6, 84.9, 84.7), strict=True)),
    aliases=dict(zip(("moh_transnext_small_80", "moh_transnext_small_75", "moh_transnext_base_75",
                      "moh_transnext_base_50"), _PUBLISHED, strict=True)),
    weights={
        f"moh_vit_{short.lower()}_{share}": Weights(
            f"hf:Chat-UniVi/MoH-ViT-{short}-{share}/moh_transnext_{size}_{share}.pth",
            licence="Apache-2.0")
        for short, size, share in (("S", "small", 80), ("B", "base", 75), ("B", "base", 50))
    },
    goldens=("moh_vit_s_75", "op_moh_attention", "op_moh_aggregated_attention"),
    tests=("tests/papers/test_moh.py",),
)


class HeadGate(nn.Module):
    """The gates of all heads, shared ones first: (B, *grid, C) -> (B, *grid, heads).

    By default a quarter of the heads is shared and half of them is chosen of the rest; under four heads all are shared.
    """

    def __init__(self, site: Site, shared: int | None, routed: int | None) -> None:
        super().__init__()
        few = site.heads < 4
        self.shared = (site.heads if few else site.heads // 4) if shared is None else shared
        self.routed = (0 if few else site.heads // 2) if routed is None else routed
        self.choices = site.heads - self.shared if self.routed else 0
        if not 0 <= self.routed <= self.choices or self.shared + self.choices != site.heads:
            raise SaccadeError(f"shared={self.shared}, routed={self.routed} of {site.heads} heads: all are shared and "
                               "none is routed, or some of those that are not shared are routed")
        self.share = nn.Linear(site.dim, self.shared, bias=False) if self.shared > 1 else None
        self.route = nn.Linear(site.dim, self.choices, bias=False) if self.routed else None
        self.balance = nn.Linear(site.dim, 2, bias=False) if self.routed and self.shared else None

    def chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax over routed heads and the mask (0 or 1) of those that a token takes."""
        scores = logits.softmax(-1)
        return scores, torch.zeros_like(scores).scatter(-1, scores.topk(self.routed, -1).indices, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        gates = []
        if self.shared:
            gates.append(self.share(x).softmax(-1) * self.shared if self.share is not None
                         else torch.ones_like(x[..., :1]))
        if self.route is not None:
            scores, mask = self.chosen(self.route(x))
            kept = scores * mask
            gates.append(kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps) * self.routed)
        if self.balance is not None:
            between = 2 * self.balance(x).softmax(-1)
            gates = [gate * part for gate, part in zip(gates, between.split(1, -1), strict=True)]
        result = torch.cat(gates, -1)
        if recording():
            note(result.flatten(1, -2).transpose(1, 2)[..., None])
        return result

    def cost(self, tokens: int) -> int:
        """Multiply-adds of the gates of `tokens` tokens."""
        layers = [layer for layer in (self.share, self.route, self.balance) if layer is not None]
        return tokens * sum(layer.weight.numel() for layer in layers)


class MixtureOfHead(CosineAttention):
    """Length-scaled cosine attention to all tokens whose heads are gated: (B, *grid, C) -> (B, *grid, C)."""

    template = Template(
        "cosine of q + e and k, and offset",
        "softmax, scaled by log N; a gate a head",
        "sum of v over the heads chosen",
    )

    def __init__(
        self, site: Site, shared: int | None = None, routed: int | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__(site, qkv_bias)
        self.gate = HeadGate(site, shared, routed)

    def weigh(self, heads: Tensor, x: Tensor) -> Tensor:
        return heads * self.gate(x)[..., None]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return super().cost(site, grid) + self.gate.cost(prod(grid))


class AggregatedMixtureOfHead(AggregatedAttention):
    """Aggregated attention whose heads are gated: (B, *grid, C) -> (B, *grid, C)."""

    template = Template(
        "cosine of q and k, near and pooled, and offsets",
        "one softmax over both; a gate a head",
        "sum of v over the heads chosen",
    )

    def __init__(
        self, site: Site, shared: int | None = None, routed: int | None = None, ratio: int = 2, window: int = 3,
        pool: int | None = None, qkv_bias: bool = True,
    ) -> None:
        super().__init__(site, ratio, window, pool, qkv_bias)
        self.gate = HeadGate(site, shared, routed)

    def weigh(self, heads: Tensor, x: Tensor) -> Tensor:
        return heads * self.gate(x)[..., None]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return super().cost(site, grid) + self.gate.cost(prod(grid))


@contextmanager
def load_balance(model: nn.Module) -> Iterator[list[Tensor]]:
    """The load-balance loss of each gate of a forward inside the block; add 0.01 of their sum to the training loss.

    E sum_h f_h P_h over E routed heads, f_h the share of tokens that take head h, P_h its mean softmax score. (Jin et
    al., MoH, 2024, equation 8.)
    """
    losses: list[Tensor] = []

    def keep(gate: HeadGate) -> Any:
        def hook(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            scores, mask = gate.chosen(logits.flatten(0, -2))
            losses.append((scores.mean(0) * mask.mean(0)).sum() * gate.choices)
        return hook

    handles = [module.route.register_forward_hook(keep(module)) for module in model.modules()
               if isinstance(module, HeadGate) and module.route is not None]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


SIZES: dict[str, dict[str, Any]] = {
    "moh_vit_s_80": dict(host="transnext_small", shared=(3, 6, 3, 8), routed=(0, 0, 6, 12)),
    "moh_vit_s_75": dict(host="transnext_small", shared=(3, 6, 3, 4), routed=(0, 0, 6, 12)),
    "moh_vit_b_75": dict(host="transnext_base", shared=(4, 8, 4, 5), routed=(0, 0, 8, 16)),
    "moh_vit_b_50": dict(host="transnext_base", shared=(2, 2, 2, 4), routed=(2, 4, 6, 8)),
    "moh_nano": dict(host="transnext_nano", shared=(2, 1, 2), routed=(0, 2, 3), pooling=(4, 2, 1)),
}


def moh(
    host: str,
    shared: Sequence[int],
    routed: Sequence[int],
    pooling: Sequence[int] = (8, 4, 2, 1),
    mixer: Any = None,
    **common: Any,
) -> Backbone:
    """A TransNeXt (`host`) whose heads are gated: `shared` and `routed` heads a stage."""

    def own(site: Site) -> nn.Module:
        heads, ratio = (shared[site.stage], routed[site.stage]), pooling[site.stage]
        return AggregatedMixtureOfHead(site, *heads, ratio) if ratio > 1 else MixtureOfHead(site, *heads)

    return create_model(host, mixer=hybrid_mixer(own, mixer), **common)


GATES: KeyMap = (
    (r"wg\.(.*)", r"gate.route.\1"),
    (r"wg_0\.(.*)", r"gate.balance.\1"),
    (r"wg_1\.(.*)", r"gate.share.\1"),
    *NAMES,
)
AUTHORS: KeyMap = pvt_names((*within(GATES, r"attn\.", "mixer."), (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1")))
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
