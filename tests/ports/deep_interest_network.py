"""Dice, the local activation unit, and the pooling of behaviours that it weighs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.golden import make_inputs
from saccade.papers.deep_interest_network import AUTHORS, DICE, UNIT, Dice, InterestPooling, LocalActivation
from tests.ports.port import Port, State, key_map

ACTIVATIONS = {"dice": Dice, "sigmoid": lambda dim: nn.Sigmoid(), "relu": lambda dim: nn.ReLU(),
               "prelu": lambda dim: nn.PReLU(), "linear": lambda dim: nn.Identity()}


class Scores(InterestPooling):
    """The weights alone (return_score)."""

    def forward(self, candidate: Tensor, behaviours: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.weigh(candidate, behaviours, valid)


def one_query(inputs: State) -> tuple[Any, ...]:
    """The authors' query (B, 1, C), keys (B, T, C) and, of a pooling, how many of them are (B, 1), or which (B, T)."""
    query, keys, *given = inputs.values()
    valid = [one if one.dtype == torch.bool else torch.arange(keys.shape[1]) < one.view(-1, 1) for one in given]
    return query[:, 0], keys, *valid[-1:]


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "Dice":
        return Port(Dice(args["emb_size"]), key_map(DICE))
    dim = args.get("embedding_dim", next(iter(make_inputs(golden).values())).shape[-1])
    activation = ACTIVATIONS[args.get("att_activation", args.get("activation", "sigmoid")).lower()]
    if what == "LocalActivationUnit":
        return Port(LocalActivation(dim, args.get("hidden_units", (64, 32)), activation), key_map(UNIT), one_query,
                    lambda result: {"out": result[..., None]})
    pooling = Scores if args.get("return_score") else InterestPooling
    module = pooling(dim, args.get("att_hidden_units", (80, 40)), activation, args.get("weight_normalization", False))
    return Port(module, key_map(AUTHORS), one_query, lambda result: {"out": result[:, None]})
