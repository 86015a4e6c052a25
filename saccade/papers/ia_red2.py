"""IA-RED2: an interpreter before each group of blocks says which patches are worth going on with.

It asks each token with the query of the class token, head by head,
    p_i = mean over heads of sigmoid(q_class . k_i / sqrt(d)),   q, k = qk(norm(x)),
times whether the token was kept before, and keeps those with p_i above one half. p is a map of what matters to the
network, learned with no label but the class: interpreters are trained one group after another by REINFORCE, with reward
    R = 1 - (kept / N)^2 where the class is right, else -penalty,
less that of the choice made without sampling (Pan et al., equations 1-4).

Pan, Panda, Jiang, Wang, Feris, Oliva, "IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers",
2021, section 3.

The authors multiply dropped tokens by 0 and mask them as keys; ours are gone, with the same scores, for nothing that is
kept ever sees them. Pictures of a batch are packed to the longest. The class token ranks and, with all prefix tokens,
stays. Quirk: a third of the interpreter's projection (values) is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.host import HostBlock, check_rate, chosen_layers, gathered, open_blocks, packed
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain

CARD = Card(
    "IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers",
    authors="Pan, Panda, Jiang, Wang, Feris, Oliva",
    year=2021,
    systems=("ia_red2",),
    arxiv="2106.12620",
    read="paper",
    keywords="interpretability-aware redundancy reduction, patch dropping, interpreter, policy gradient, REINFORCE",
    kinds=("token reduction", "backbone"),
    methods={"ia_red2": "ia_red2"},
    goldens=("ia_red2_deit_small", "ia_red2_deit_tiny", "op_ia_red2_interpreter"),
    tests=("tests/papers/test_ia_red2.py",),
)


class Interpreter(nn.Module):
    """How much each token is worth keeping, by the class token: (B, N, C) -> (B, N) between 0 and 1."""

    def __init__(self, dim: int, heads: int = 6) -> None:
        super().__init__()
        if dim % heads:
            raise SaccadeError(f"ia_red2: {heads} heads do not divide {dim} channels; choose a divisor")
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qk = nn.Linear(dim, 3 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        dim = tokens.shape[-1]
        x, weight, bias = self.norm(tokens), self.qk.weight, self.qk.bias
        q = nn.functional.linear(x[:, :1], weight[:dim], bias[:dim]).unflatten(-1, (self.heads, -1))
        k = nn.functional.linear(x, weight[dim:2 * dim], bias[dim:2 * dim]).unflatten(-1, (self.heads, -1))
        return ((q * k).sum(-1) * q.shape[-1] ** -0.5).sigmoid().mean(-1)


class InterpretedBlock(HostBlock):
    """A block that, where it has an interpreter, goes on with the tokens worth more than `threshold`.

    `importance` (B, P + N) is its map, 0 where a token was gone before. In training, where `samples`, tokens are kept
    with the probability that the map gives, and `log_probability` (B,) is that of the choice.
    """

    def __init__(self, interpreter: Interpreter | None, threshold: float, **host: Any) -> None:
        super().__init__(**host)
        self.interpreter: Any = interpreter
        self.threshold = threshold
        self.watched = nn.Identity()  # hooks see the map of the whole picture here
        self.samples = False

    def drops(self) -> bool:
        return self.interpreter is not None and self.threshold > 0

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        if self.interpreter is not None:
            tokens = self.select(tokens)
        q, k, v = self.queries_keys_values(tokens)
        return self.add_mlp(self.add_mixed(tokens, attend(q, k, v, self.kept.padding_bias(q), where=self.kept.where)))

    def select(self, tokens: Tensor) -> Tensor:
        """Those of (B, N, C) that stay, packed."""
        numbers = self.kept.numbers.expand(len(tokens), -1)
        worth = self.interpreter(tokens).masked_fill(numbers < 0, 0.0)
        whole = worth.new_zeros(len(worth), self.kept.count)
        self.importance = self.watched(whole.scatter_add(1, numbers.clamp(min=0), worth)).detach()
        stays = worth > self.threshold
        if self.training and self.samples:
            stays = torch.bernoulli(worth.detach()).bool()
            chance = torch.where(stays, worth, 1 - worth).clamp(min=1e-6).log()
            self.log_probability = chance.masked_fill(numbers < 0, 0.0)[:, self.prefix:].sum(1)
        stays = stays & (numbers >= 0)
        stays[:, :self.prefix] = True
        index, real = packed(stays)
        self.kept.choose(index, real=real)
        self.share = (stays.sum(1) - self.prefix) / (self.kept.count - self.prefix)
        return gathered(tokens, index)


LAYERS = (0, 4, 8)


def ia_red2(
    model: nn.Module, layers: Sequence[int] | None = None, threshold: float = 0.5, heads: int = 6
) -> Handle:
    """Put an interpreter before each of the blocks `layers`; its weights are to be trained.

    By default before 0, 4 and 8 of 12 blocks, at the same shares of another depth.
    """
    chosen = chosen_layers(model, "ia_red2", layers, LAYERS)
    if threshold:
        check_rate("ia_red2", "threshold", threshold)

    def build(number: int, block: Any, **host: Any) -> nn.Module:
        interpreter = Interpreter(block.norm1.weight.shape[0], heads) if number in chosen else None
        return InterpretedBlock(interpreter, threshold, block=block, **host)

    return open_blocks(model, "ia_red2", build, needs_class_token=True)


def importance(model: nn.Module) -> list[Tensor]:
    """The interpretation maps (B, P + N) of the last forward, one a group of blocks."""
    return [block.importance for block in model.modules()
            if isinstance(block, InterpretedBlock) and block.interpreter is not None]


def reward(right: Tensor, share: Tensor, penalty: float = 0.5) -> Tensor:
    """1 - share^2 where a picture's class is right, else -penalty; `right` (B,) bool, `share` (B,) of tokens kept."""
    return torch.where(right, 1 - share.square(), share.new_tensor(-penalty))


def reinforce_loss(log_probability: Tensor, sampled: Tensor, greedy: Tensor) -> Tensor:
    """-(R(sampled choice) - R(choice without sampling)) log p(sampled choice), the mean over (B,): self-critical."""
    return -((sampled - greedy).detach() * log_probability).mean()


SIZES: dict[str, dict[str, Any]] = {
    f"ia_red2_deit_{size}": dict(shape, builder="ia_red2_deit") for size, shape in DEIT_SIZES.items()
}


def ia_red2_deit(
    dim: int, depth: int, heads: int, layers: Sequence[int] = LAYERS, patch: int = 16, mixer: Any = None,
    **common: Any,
) -> Plain:
    """A DeiT of a size with its interpreters."""
    model = Plain(dim, depth, heads, patch=patch, replace=mixer, **common)
    ia_red2(model, layers)
    return model


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The blocks before which a golden's interpreters stand."""
    return dict(layers=(0, *accumulate(golden["source"]["args"]["group_size"][:-1])))


def authors_names(layers: Sequence[int]) -> KeyMap:
    """The authors' names where interpreters stand before the blocks `layers`."""
    return (
        Dropped(r"groups\.\d+\.block_list\..*", "the blocks once more"),
        *((rf"groups\.{group}\.agent\.(.*)", rf"blocks.{layer}.interpreter.\1") for group, layer in enumerate(layers)),
        *DEIT,
    )


def taps(layers: Sequence[int]) -> dict[str, str]:
    """Where the interpreters' maps are."""
    return {f"prob{group}": f"blocks.{layer}.watched" for group, layer in enumerate(layers)}


AUTHORS, TAPS = authors_names(LAYERS), taps(LAYERS)
