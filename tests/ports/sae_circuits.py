"""The autoencoder, and the scores of heads and edges from given activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import Dropped
from saccade.papers.sae_circuits import AUTHORS, SparseAutoencoder, edge_scores, head_scores
from tests.ports.port import Port, key_map

HEADS_A_LAYER = 4


class Scores(nn.Module):
    def __init__(self, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        codes = x.argmax(-1)
        positive = torch.arange(len(x)) < len(x) // 2
        found = head_scores(codes, positive, self.normalise)
        layers = (-1, HEADS_A_LAYER)
        return {"node_positive": found.unflatten(0, layers), "node_score": found.softmax(0),
                "node_negative": head_scores(codes, ~positive, self.normalise).unflatten(0, layers),
                "edge": edge_scores(codes, positive, self.normalise)}

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return 0  # counts alone


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if "normalise" in args:
        return Port(Scores(args["normalise"]), key_map(()), outputs=lambda result: result)
    model = SparseAutoencoder(args["n_input_features"], args["n_learned_features"])
    rules = tuple(Dropped(rf"sae\.{rule.pattern}", rule.reason) if isinstance(rule, Dropped)
                  else (rf"sae\.{rule[0]}", *rule[1:]) for rule in AUTHORS)
    return Port(model, key_map(rules), outputs=lambda result: {
        "learned": result[0], "decoded": result[1], "codes": result[0].argmax(-1)})
