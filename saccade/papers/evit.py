"""EViT: keep the tokens that the class token looks at, fuse the others into one.

In some blocks (the 4th, 7th and 10th), between attention and MLP, tokens are ranked by how much the class token looks
at them, a_i = mean over heads of softmax(q_class k^T / sqrt(d))_i. The ceil(keep N) first stay, in falling order; the
others become one token, sum_i a_i x_i (the weights as they are, not renormalised: so do the authors). The fused token
is a candidate like any other in the next such block.

Liang, Ge, Tong, Song, Wang, Xie, "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", 2022, sections 3.2-3.3.

Any host of prefix and grid tokens; prefix tokens always stay, and the first of them ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.host import HostBlock, check_rate, chosen_layers, class_attention, gathered, open_blocks
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain

CARD = Card(
    "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    authors="Liang, Ge, Tong, Song, Wang, Xie",
    year=2022,
    systems=("evit",),
    arxiv="2202.07800",
    code="youweiliang/evit@5ca95a7",
    licence="Apache-2.0",
    read="paper, code",
    keywords="token pruning, attentive tokens, inattentive token fusion, keep rate, dynamic inference",
    kinds=("token reduction", "backbone"),
    methods={"evit": "evit"},
    params={"evit_deit_small": 22.1e6},
    macs={"evit_deit_small": 3.0e9},
    top1={"evit_deit_small": 79.5},
    weights={
        name: Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing", top1=top1, licence="Apache-2.0")
        for name, file, top1 in (("evit_deit_small", "1FfvdEBss9f8gexjqEY8vOSUQe_8qwYuL", 79.5),
                                 ("evit_deit_small_nofuse", "1VCZGphW34rFWZDXOoF7XO4EJfRLZ-YB8", 79.4))
    },
    goldens=("evit_deit_small", "evit_deit_tiny_nofuse", "op_evit_block"),
    tests=("tests/papers/test_evit.py",),
)


class EvitBlock(HostBlock):
    """A block that, where it `shrinks`, lets go of all but the share `keep` of its grid tokens before the MLP."""

    def __init__(self, shrinks: bool, keep: float, fuse: bool, **host: Any) -> None:
        super().__init__(**host)
        self.shrinks, self.keep, self.fuse = shrinks, keep, fuse

    def drops(self) -> bool:
        return self.shrinks and self.keep < 1

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        q, k, v = self.queries_keys_values(tokens)
        tokens = self.add_mixed(tokens, attend(q, k, v, where=self.kept.where))
        if self.drops():
            tokens = self.reorganise(tokens, class_attention(q, k, self.prefix))
        return self.add_mlp(tokens)

    def reorganise(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """(B, P + N, C) and (B, N) -> (B, P + ceil(keep N) + 1, C); without `fuse`, no token for the rest."""
        prefix, rest = tokens[:, :self.prefix], tokens[:, self.prefix:]
        order = attention.argsort(dim=1, descending=True)
        stay, go = order.tensor_split((ceil(self.keep * order.shape[1]),), 1)
        parts = [prefix, gathered(rest, stay)]
        if self.fuse:
            parts.append((gathered(rest, go) * attention.gather(1, go)[..., None]).sum(1, keepdim=True))
        self.kept.choose(self.after_prefix(stay), fused=int(self.fuse))
        return torch.cat(parts, 1)


LAYERS = (3, 6, 9)


def evit(model: nn.Module, keep: float = 0.7, layers: Sequence[int] | None = None, fuse: bool = True) -> Handle:
    """Keep the share `keep` of the grid tokens in each of the blocks `layers`; `fuse` the others into one token.

    By default 3, 6 and 9 of 12 blocks, at the same shares of another depth.
    """
    check_rate("evit", "keep", keep)
    chosen = chosen_layers(model, "evit", layers, LAYERS)
    return open_blocks(model, "evit", lambda number, **host: EvitBlock(number in chosen, keep, fuse, **host),
                       needs_class_token=True)


def set_keep(model: nn.Module, keep: float) -> None:
    """Another keep rate for a model that evit is applied to, in the blocks that shrink, as training proceeds."""
    check_rate("evit", "keep", keep)
    for block in model.modules():
        if isinstance(block, EvitBlock) and block.shrinks:
            block.keep = keep


def keep_at(progress: float, keep: float) -> float:
    """The schedule of the paper's training: from 1 to `keep` along half a cosine while `progress` goes from 0 to 1."""
    return keep + (1 - keep) * (1 + cos(pi * min(max(progress, 0.0), 1.0))) / 2


SIZES: dict[str, dict[str, Any]] = {
    f"evit_deit_{size}{suffix}": dict(shape, builder="evit_deit", fuse=not suffix)
    for size, shape in DEIT_SIZES.items() for suffix in ("", "_nofuse")
}


def evit_deit(
    dim: int, depth: int, heads: int, keep: float = 0.7, layers: Sequence[int] = LAYERS, fuse: bool = True,
    patch: int = 16, mixer: Any = None, **common: Any,
) -> Plain:
    """A DeiT of a size with EViT applied."""
    model = Plain(dim, depth, heads, patch=patch, replace=mixer, **common)
    evit(model, keep, layers, fuse)
    return model


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The rates that a golden was recorded with."""
    rates = golden["source"]["args"]["keep_rate"]
    return dict(keep=min(rates), layers=tuple(number for number, rate in enumerate(rates) if rate < 1),
                fuse=golden["source"]["args"]["fuse_token"])


AUTHORS: KeyMap = DEIT
TAPS = {r"block(\d+)": r"blocks.\1"}
