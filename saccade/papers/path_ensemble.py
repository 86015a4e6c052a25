"""Path ensemble: a vision transformer is a sum of paths, and not all of them help the classifier.

With pre-norm blocks of attention M and MLP F the last tokens are a sum of 2L + 1 terms,
    X_L = P_0 + sum_l (P_{2l-1} + P_{2l}),   P_0 = X_0,   P_{2l-1} = M_l(X_{l-1}),   P_{2l} = F_l(X_{l-1} + P_{2l-1}).
Each term is read by the classifier, and by the blocks after it. For the classifier alone, terms can be cut or weighed,
    E = sum_k s_k P_k,   s_k in R^C (EnsembleScale; 0: cut),   scores = head(norm(E)),
while the blocks go on to read the plain sum. In training the whole teaches what the shorter sums say.

Chang, Wang, Luo, Wang, Shou, "Revisiting Vision Transformer from the View of Path Ensemble", 2023.

Any host of pre-norm blocks, ours or timm's. The start of s at 1, and the distillation by the scores that the shared
head gives to the shorter sums, are ours: they were not to be had.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.host import HostBlock, blocks_of, open_blocks
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain

CARD = Card(
    "Revisiting Vision Transformer from the View of Path Ensemble",
    authors="Chang, Wang, Luo, Wang, Shou",
    year=2023,
    systems=("path_ensemble",),
    arxiv="2308.06548",
    read="abstract, fact sheet",
    keywords="path ensemble, path pruning, EnsembleScale, self-distillation, residual paths, path importance",
    kinds=("backbone",),
    tests=("tests/papers/test_path_ensemble.py",),
)


class Paths:
    """The ensemble sum of a forward, and its terms where `keeps`."""

    total: Tensor | None = None
    terms: list[Tensor]
    keeps = False

    def start(self) -> None:
        self.terms = []


class PathBlock(HostBlock):
    """A block that adds its terms to the plain sum, and weighed to the ensemble's; the last gives the ensemble's.

    `kept_terms` says which of its terms (in the first block the embedding too) the ensemble has.
    """

    def __init__(self, paths: Paths, kept_terms: list[bool], last: bool, scaled: bool, **host: Any) -> None:
        super().__init__(**host)
        self.paths, self.kept_terms, self.last = paths, kept_terms, last
        count, dim = len(kept_terms), self.norm1.weight.shape[0]
        self.scale = nn.Parameter(torch.ones(count, dim)) if scaled else None

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        if self.first:
            self.paths.start()
        mixed = self.add_mixed(tokens.new_zeros(()), attend(*self.queries_keys_values(tokens), where=self.kept.where))
        between = tokens + mixed
        after = self.add_mlp(between, tokens.new_zeros(()))
        terms = [tokens, mixed, after] if self.first else [mixed, after]
        total = None if self.first else self.paths.total
        for number, (term, kept) in enumerate(zip(terms, self.kept_terms, strict=True)):
            if self.paths.keeps:
                self.paths.terms.append(term)
            if kept:
                weighed = term if self.scale is None else term * self.scale[number]
                total = weighed if total is None else total + weighed
        total = torch.zeros_like(tokens) if total is None else total
        self.paths.total = None if self.last else total  # a model that holds no tensor of a graph can be copied
        return total if self.last else between + after

    def add_mlp(self, tokens: Tensor, to: Tensor | None = None) -> Tensor:
        """`to` (tokens themselves where None) + tail2(mlp(norm2(tokens)))."""
        return (tokens if to is None else to) + self._tail(1, self.mlp(self.norm2(tokens)))


def path_ensemble(model: nn.Module, cut: Collection[int] = (), scaled: bool = False) -> Handle:
    """Let the classifier read the ensemble: without the paths `cut` (0 to 2L), each path `scaled` by learned weights.

    With neither, the host's very numbers (up to rounding). The blocks keep the names of their parameters.
    """
    depth = len(blocks_of(model, "path_ensemble"))
    wrong = [path for path in cut if not 0 <= path <= 2 * depth]
    if wrong or len(set(cut)) > 2 * depth:
        raise SaccadeError(f"path_ensemble: cut={sorted(cut)}; the host has the paths 0 to {2 * depth}, one must stay")
    paths = Paths()

    def build(number: int, **host: Any) -> nn.Module:
        own = range(2 * number + 1 if number else 0, 2 * number + 3)
        return PathBlock(paths, [path not in cut for path in own], number == depth - 1, scaled, **host)

    return open_blocks(model, "path_ensemble", build)


def path_terms(model: nn.Module, image: Tensor) -> Tensor:
    """The terms (2L + 1, B, P + N, C) of a host's last tokens, with gradients; they sum up to them.

    `model` is a host, or one that `path_ensemble` has changed.
    """
    handle = None
    if not any(isinstance(block, PathBlock) for block in blocks_of(model, "path_ensemble")):
        handle = path_ensemble(model)
    opened: Any = blocks_of(model, "path_ensemble")[0]
    opened.paths.keeps = True
    try:
        model.forward_features(image)  # type: ignore[operator]
        return torch.stack(opened.paths.terms)
    finally:
        opened.paths.keeps, opened.paths.terms = False, []
        if handle is not None:
            handle.undo()


def scores_of(model: Any, tokens: Tensor) -> Tensor:
    """What the host's classifier says of an ensemble (B, P + N, C), before its norm."""
    scores: Tensor = model.forward_head(model.norm(tokens))
    return scores


@torch.no_grad()
def path_importance(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """(2L + 1,): how much accuracy the classifier loses without each path; below 0, the path pulls it down."""
    terms = path_terms(model, image)
    whole = terms.sum(0)

    def accuracy(tokens: Tensor) -> Tensor:
        return (scores_of(model, tokens).argmax(1) == label).double().mean()

    return accuracy(whole) - torch.stack([accuracy(whole - term) for term in terms])


def short_scores(model: nn.Module, terms: Tensor) -> Tensor:
    """(L, B, classes): the classifier on the sums of paths up to each block; the last is the host's answer."""
    return torch.stack([scores_of(model, total) for total in terms.cumsum(0)[2::2]])


def self_distillation_loss(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over the shorter sums of t^2 KL(softmax(z_L / t) || softmax(z_l / t)), z_L fixed; scores (L, B, K)."""
    target = (scores[-1].detach() / temperature).softmax(-1)
    short = (scores[:-1] / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(short, target.expand_as(short), reduction="none").sum(-1).mean()


def zero_frequency_share(tokens: Tensor) -> Tensor:
    """The share (B,) of the energy of grid tokens (B, N, C) that their mean has: high-pass filters take it away."""
    return tokens.mean(1).square().sum(-1) / tokens.square().sum(-1).mean(1)


SIZES: dict[str, dict[str, Any]] = {
    f"path_ensemble_deit_{size}": dict(shape, builder="path_ensemble_deit") for size, shape in DEIT_SIZES.items()
} | {"path_ensemble_nano": dict(dim=64, depth=4, heads=2, patch=4, img_size=32, builder="path_ensemble_deit")}


def path_ensemble_deit(
    dim: int, depth: int, heads: int, cut: Collection[int] = (), patch: int = 16, mixer: Any = None, **common: Any
) -> Plain:
    """A DeiT of a size with EnsembleScale."""
    model = Plain(dim, depth, heads, patch=patch, replace=mixer, **common)
    path_ensemble(model, cut, scaled=True)
    return model


AUTHORS: KeyMap = DEIT
