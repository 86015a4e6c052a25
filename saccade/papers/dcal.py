"""DCAL: beside self-attention, a view of the telling regions, and in training a distracting picture.

A vision transformer for things that differ little (birds, cars, persons), with two more kinds of attention.
Global-local: the patches that the class token saw through all blocks, by the rollout r = e_class S_L ... S_1 of
S = (I + mean over heads of A) / 2, and the class token ask once more, of all tokens,
    out_i = sum_j softmax_j(q_i k_j / sqrt(d)) v_j,   i in class and top(r).
Pair-wise, in training alone: by the weights of the self-attention, queries of one picture see keys and values of it and
of another, which is to be looked past,
    out_i = sum_j softmax_j(q_i [k, k']_j / sqrt(d)) [v, v']_j.
The three class tokens have their losses, balanced by learned uncertainties; a picture's class is the mean of what the
first two say, its descriptor both beside each other.

Zhu, Ke, Li, Liu, Tian, Shan, "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", 2022, section 3.

Any grid, as the ViT's. Of the one global-local block the class token alone is read, and what it is told does not depend
on which patches ask beside it: `forward` spares the rollout and the patches, at the same numbers; `look` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import record
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import Attention, CrossAttention
from saccade.parts.block import LAYER_NORM, Norm
from saccade.parts.head import Pooling, pool_tokens
from saccade.parts.host import gathered
from saccade.parts.mlp import Mlp
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain, initialise
from saccade.parts.tokens import join, split, token_numbers

CARD = Card(
    "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    authors="Zhu, Ke, Li, Liu, Tian, Shan",
    year=2022,
    systems=("dcal",),
    arxiv="2205.02151",
    code="mossbee/clau_duaL_cross_attention_learning@6a4e6b6 (of others; the authors published none)",
    licence="unknown",
    read="abstract",
    keywords="DCAL, global-local cross-attention, pair-wise cross-attention, attention rollout, fine-grained "
             "recognition, re-identification, uncertainty weights",
    kinds=("backbone", "mixer"),
    mixers={"pairwise_attention": "PairwiseAttention"},
    goldens=("op_dcal_glca", "op_dcal_pwca"),
    tests=("tests/papers/test_dcal.py",),
)


class PairwiseAttention(Attention):
    """Self-attention, and with the tokens of another picture as `context` (B, M, C) attention to both.

    (B, *grid, C) -> the same, by one set of weights: what learns from the pair attends alone afterwards.
    """

    context = True
    template = Template("q k^T / sqrt(d), also to tokens of another picture", "softmax", "sum of v")

    def forward(  # type: ignore[override]
        self, x: Tensor, prefix: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if context is None:
            return super().forward(x) if prefix is None else super().forward(x, prefix)
        tokens = join(x, prefix)
        both = self.qkv(torch.cat([tokens, context], 1))
        q, k, v = both.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q[:, :, :tokens.shape[1]], k, v)  # no `where`: half of its keys are on another picture
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """What the first token saw through all layers: maps A (B, heads, T, T), first layer first -> (B, T).

    The first row of the product of S = (I + mean over heads of A) / 2, from the last layer back: vectors times
    matrices. (Abnar, Zuidema, "Quantifying Attention Flow in Transformers", 2020.)
    """
    row = torch.zeros_like(maps[0][:, 0, :1])
    row[..., 0] = 1
    for weights in reversed(maps):
        row = (row + row @ weights.mean(1)) / 2
    return row[:, 0]


def telling(seen: Tensor, share: float, prefix: int = 1) -> Tensor:
    """Places of the class token, and then of the `share` of patches that it saw most: (B, P + N) -> (B, 1 + K)."""
    patches = seen[:, prefix:]
    best = patches.topk(int(share * patches.shape[1])).indices + prefix
    return torch.cat([torch.zeros_like(seen[:, :1], dtype=torch.long), best], 1)


class GlobalLocalAttention(CrossAttention):
    """What all tells the tokens at `places`, by projections of its own: (B, T, C), (B, K) -> (B, K, C)."""

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        q = self.q(gathered(tokens, places)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=lambda: (places, token_numbers(tokens.shape[1], tokens.device)))
        return self.proj(out.transpose(1, 2).flatten(2))


class GlobalLocalBlock(nn.Module):
    """x += attention(norm(x), norm of all); x += mlp(norm(x)), x the tokens at `places`: (B, T, C) -> (B, K, C)."""

    def __init__(self, dim: int, heads: int, norm: Norm = LAYER_NORM) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attention = GlobalLocalAttention(dim, heads)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = gathered(tokens, places) + self.attention(self.norm1(tokens), places)
        return x + self.mlp(self.norm2(x))


class Branches(NamedTuple):
    """Class scores (B, classes), or features where there is no head, of the three attentions; no pair, no `paired`."""

    alone: Tensor
    local: Tensor
    paired: Tensor | None


class Look(NamedTuple):
    """What the class token saw of the map, (B, *grid), the places of the patches that ask, and what they are told."""

    seen: Tensor
    places: Tensor
    local: Tensor


class Dcal(Plain):
    """A ViT with one global-local block behind the others, which asks with the `share` of most seen patches.

    `forward` gives log of the mean probability of both heads, without classes their features beside each other.
    Train with `branches(image, pairs)`, three cross-entropies, and `UncertaintyWeights`.
    """

    def __init__(self, dim: int, depth: int, heads: int, share: float = 0.1, norm: Norm = LAYER_NORM, **options: Any
                 ) -> None:
        if not 0 <= share <= 1:
            raise SaccadeError(f"share={share} of the patches: give 0 to 1 (the paper: 0.1, for persons 0.3)")
        super().__init__(dim, depth, heads, norm=norm, **options)
        if self.prefix is None:
            raise SaccadeError("DCAL reads class tokens: build it with prefix=1")
        self.share = share
        self.local, self.norm_local = GlobalLocalBlock(dim, heads, norm), norm(dim)
        self.local.apply(lambda module: initialise(module, 0.02))

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Put new heads of `num_classes` (0: none) in place."""
        self.num_features = self.norm.weight.numel()  # type: ignore[operator]
        super().reset_classifier(num_classes, global_pool)
        self.head_local = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        initialise(self.head_local, 0.02)
        self.num_features *= 2
        self.removed = () if num_classes else ("head", "head_local")

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 1 + P + N, C): the class token of the global-local block, then all tokens after the final norm."""
        tokens, grid = self.tokens(image)
        for block in self.blocks:
            tokens = block(tokens, self.prefix_count, grid)
        return torch.cat([self.told(tokens), self.norm(tokens)], 1)

    def told(self, tokens: Tensor) -> Tensor:
        """The class token of the global-local block, (B, 1, C), after its norm."""
        places = torch.zeros(tokens.shape[0], 1, dtype=torch.long, device=tokens.device)
        return self.norm_local(self.local(tokens, places))

    def scores(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What both heads say of `forward_features`."""
        alone = self.head(pool_tokens(tokens[:, 1:], self.global_pool, self.prefix_count, self.pool))
        return alone, self.head_local(tokens[:, 0])

    def forward_head(self, tokens: Tensor) -> Tensor:
        alone, local = self.scores(tokens)
        if not self.num_classes:
            return torch.cat([alone, local], -1)
        return torch.logaddexp(alone.log_softmax(-1), local.log_softmax(-1)) - log(2)

    def branches(self, image: Tensor, pairs: Tensor | None = None) -> Branches:
        """Scores of self-attention, of the global-local block and, in training, of self-attention beside a pair.

        `pairs` (B,) are the numbers of the pictures that distract, with what they are in this same branch; by default
        the batch is drawn two and two.
        """
        alone, local = self.scores(self.forward_features(image))
        if not self.training:
            return Branches(alone, local, None)
        if pairs is None:
            pairs = pairs_of(len(image), image.device)
        tokens, _ = self.tokens(image)
        for number, block in enumerate(self.blocks):
            if not getattr(block.mixer, "context", False):
                raise SaccadeError(f"blocks.{number} has {type(block.mixer).__name__}, which sees no second picture: "
                                   'pairs need mixer="pairwise_attention"')
            normed = block.norm1(tokens)  # type: ignore[operator]
            tokens = tokens + block.scale1(block.mixer(normed, context=normed[pairs]))  # type: ignore[operator]
            tokens = tokens + block.scale2(block.mlp(block.norm2(tokens)))  # type: ignore[operator]
        pooled = pool_tokens(self.norm(tokens), self.global_pool, self.prefix_count, self.pool)
        return Branches(alone, local, self.head(pooled))

    def look(self, image: Tensor) -> Look:
        """The rollout of the class token over the map, and the global-local block with all that ask."""
        tokens, grid = self.tokens(image)
        with record(self, "blocks.*") as found:
            for block in self.blocks:
                tokens = block(tokens, self.prefix_count, grid)
        seen = rollout([found[f"blocks.{number}"].dense(len(image)) for number in range(len(self.blocks))])
        places = telling(seen, self.share, self.prefix_count)
        local = self.norm_local(self.local(tokens, places))
        return Look(seen[:, self.prefix_count:].unflatten(1, grid), places, local)


def pairs_of(count: int, device: torch.device) -> Tensor:
    """For each of `count` pictures another, drawn: two and two distract each other, an odd one has another's."""
    if count < 2:
        raise SaccadeError("a pair needs two pictures: train with batches of 2 or more")
    order = torch.randperm(count, device=device)
    return torch.empty_like(order).scatter(0, order, order[(torch.arange(count, device=device) ^ 1) % count])


class UncertaintyWeights(nn.Module):
    """1/2 sum_i (e^-w_i L_i + w_i) of several losses, w learned: their log variances.

    (Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018.)
    """

    def __init__(self, losses: int = 3) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(losses))

    def forward(self, *losses: Tensor) -> Tensor:
        return 0.5 * (torch.stack(losses) * (-self.log_variance).exp() + self.log_variance).sum()


SIZES: dict[str, dict[str, Any]] = {
    **{f"dcal_deit_{size}": shape for size, shape in DEIT_SIZES.items()},
    "dcal_deit_nano": dict(dim=64, depth=6, heads=2, patch=4, img_size=32),
}


def dcal(
    dim: int, depth: int, heads: int, share: float = 0.1, patch: int = 16, mixer: Any = None, **common: Any
) -> Dcal:
    """A DeiT with DCAL; a DeiT's weights load with fresh=("local.*", "norm_local.*", "head*")."""
    return Dcal(dim, depth, heads, share, patch=patch, mixer=PairwiseAttention, replace=mixer, **common)


AUTHORS: KeyMap = DEIT
