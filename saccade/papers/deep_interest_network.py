"""Deep Interest Network: of all that a user has done, what speaks for or against this very item?

A user's behaviours e_1 ... e_T (embeddings of what was bought, read, clicked) are not averaged into one vector for all
purposes; each candidate v wakes those that concern it,
    u(v) = sum_j a(e_j, v) e_j,   a an MLP of [v, e_j, v - e_j, v e_j],
and a weight is no share: without a softmax, the size of u says how strong the interest is. The MLPs turn where their
input is spread, rather than at 0 (Dice),
    f(s) = p s + (1 - p) alpha s,   p = sigmoid((s - E[s]) / sqrt(Var[s])),
and only the embeddings that a batch looks up are decayed, rare ones the more (`mini_batch_aware_decay`).

Zhou, Song, Zhu, Fan, Zhu, Ma, Yan, Jin, Li, Gai, "Deep Interest Network for Click-Through Rate Prediction", 2018.

Any length: `valid` says which behaviours are none; a user without any has u = 0.
Quirks kept: Dice's mean and variance are a batch norm's, with its learned scale and shift, and count padding too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, within
from saccade.core.record import note_rows
from saccade.parts.norm import BatchNorm

CARD = Card(
    "Deep Interest Network for Click-Through Rate Prediction",
    authors="Zhou, Song, Zhu, Fan, Zhu, Ma, Yan, Jin, Li, Gai",
    year=2018,
    systems=("deep_interest_network",),
    arxiv="1706.06978",
    code="shenweichen/DeepCTR-Torch@f685425 (a port; the authors' is for TensorFlow)",
    licence="Apache-2.0",
    read="abstract, code",
    keywords="DIN, recommendation, click-through rate, local activation unit, Dice, mini-batch aware regularization",
    kinds=("sequence",),
    goldens=("op_dice_2d", "op_dice_3d", "op_din_attention_pooling", "op_din_attention_pooling_softmax",
             "op_din_local_activation_unit"),
    tests=("tests/papers/test_deep_interest_network.py",),
)


class Dice(nn.Module):
    """p s + (1 - p) alpha s with p = sigmoid(norm(s)), over the last axis of (..., C); alpha learned, a channel each.

    Where norm(s) is s / 0 this is PReLU: p turns from 0 to 1 at the mean of the data, as fast as their spread allows.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = BatchNorm(dim, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        share = self.norm(x).sigmoid()
        return x * (share + (1 - share) * self.alpha)


Activation = Callable[[int], nn.Module]


class Perceptron(nn.Module):
    """Layers from width to width, each with its activation, then one number: (..., widths[0]) -> (...)."""

    def __init__(self, widths: Sequence[int], activation: Activation = Dice) -> None:
        super().__init__()
        self.hidden = nn.Sequential(*(layer for width, wider in zip(widths, widths[1:])
                                      for layer in (nn.Linear(width, wider), activation(wider))))
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))[..., 0]


class LocalActivation(nn.Module):
    """a(e_j, v): candidates (B, C) and behaviours (B, T, C) -> (B, T), any real numbers. (Section 4.3.)"""

    def __init__(self, dim: int, hidden: Sequence[int] = (36,), activation: Activation = Dice) -> None:
        super().__init__()
        self.mlp = Perceptron((4 * dim, *hidden), activation)

    def forward(self, candidate: Tensor, behaviours: Tensor) -> Tensor:
        v = candidate[:, None].expand_as(behaviours)
        return self.mlp(torch.cat([v, behaviours, v - behaviours, v * behaviours], -1))


class InterestPooling(nn.Module):
    """u(v) = sum_j a(e_j, v) e_j: (B, C), (B, T, C), and `valid` (B, T) bool -> (B, C).

    `softmax` makes shares of the weights, as attention does; the paper advises against it.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int] = (36,), activation: Activation = Dice, softmax: bool = False
    ) -> None:
        super().__init__()
        self.activate, self.softmax = LocalActivation(dim, hidden, activation), softmax

    def forward(self, candidate: Tensor, behaviours: Tensor, valid: Tensor | None = None) -> Tensor:
        weights = self.weigh(candidate, behaviours, valid)
        return (weights[:, None] @ behaviours)[:, 0]

    def weigh(self, candidate: Tensor, behaviours: Tensor, valid: Tensor | None = None) -> Tensor:
        """The weight of each behaviour, (B, T): 0 where it is none."""
        weights = self.activate(candidate, behaviours)
        if self.softmax:
            if valid is not None:
                weights = weights.masked_fill(~valid, torch.finfo(weights.dtype).min)
            weights = weights.softmax(-1)
        if valid is not None:
            weights = weights * valid
        return note_rows(weights)


class DeepInterest(nn.Module):
    """The logit of a click, (B,): candidate (B, F), history (B, T, F) and other features (B, G), all of them numbers.

    An item has F features (itself, its shop, its category, ...) of `vocabularies` values each, in which a history
    shares the candidate's embeddings; 0 of the first feature is padding. `others` are the vocabularies of what is known
    of the user and the moment. The loss is `binary_cross_entropy_with_logits`. (Figure 2, right.)
    """

    def __init__(
        self, vocabularies: Sequence[int], others: Sequence[int] = (), dim: int = 12, attention: Sequence[int] = (36,),
        hidden: Sequence[int] = (200, 80), activation: Activation = Dice,
    ) -> None:
        super().__init__()
        self.items = nn.ModuleList(nn.Embedding(count, dim) for count in vocabularies)
        self.others = nn.ModuleList(nn.Embedding(count, dim) for count in others)
        width = dim * len(vocabularies)
        self.pool = InterestPooling(width, attention, activation)
        self.mlp = Perceptron((2 * width + dim * len(others), *hidden), activation)

    def forward(self, candidate: Tensor, history: Tensor, others: Tensor | None = None) -> Tensor:
        v, behaviours = embed(self.items, candidate), embed(self.items, history)
        known = [v, self.pool(v, behaviours, history[..., 0] != 0)]
        if others is not None:
            known.append(embed(self.others, others))
        return self.mlp(torch.cat(known, -1))


def embed(tables: nn.ModuleList, features: Tensor) -> Tensor:
    """Numbers (..., F) as the embeddings of F tables beside each other, (..., F C)."""
    return torch.cat([table(features[..., place]) for place, table in enumerate(tables)], -1)


def mini_batch_aware_decay(weight: Tensor, features: Tensor, counts: Tensor) -> Tensor:
    """1/2 sum over the features j of a batch of |w_j|^2 / n_j: a number to add to the loss, times lambda.

    weight (K, C) are embeddings, features (any shape) the numbers that this batch looks up, counts (K,) in how many
    examples of the whole data each occurs. Its gradient, w_j / n_j, is that of the decay of equation (6); rows
    that the batch does not look up have none, so that a step costs what the batch costs.
    """
    seen = features.unique()
    return 0.5 * (weight[seen].square().sum(-1) / counts[seen]).sum()


DICE: KeyMap = ((r"alpha", "alpha", torch.flatten), (r"bn\.(.*)", r"norm.\1"), (r"(.*)", r"\1"))
UNIT: KeyMap = (
    *(rule for layer in range(8) for rule in (
        (rf"dnn\.linears\.{layer}\.(.*)", rf"mlp.hidden.{2 * layer}.\1"),
        *within(DICE, rf"dnn\.activation_layers\.{layer}\.", f"mlp.hidden.{2 * layer + 1}."))),
    (r"dense\.(.*)", r"mlp.out.\1"),
)
AUTHORS: KeyMap = within(UNIT, r"local_att\.", "activate.")
