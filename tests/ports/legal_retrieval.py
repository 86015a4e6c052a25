"""Sparsemax, and Paraformer's head."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from saccade.papers.legal_retrieval import AUTHORS, Paraformer, sparsemax
from tests.ports.port import Function, Port, State, key_map


class Head(Paraformer):
    """With all that the golden holds."""

    def forward(self, question: Tensor, sentences: Tensor, valid: Tensor | None = None) -> Any:
        attended, weights = self.attention(question, sentences, valid)
        return {"logits": self.classifier(attended), "attended": attended[:, None], "weights": weights[:, None]}


def one_question(inputs: State) -> tuple[Tensor, ...]:
    """The authors' question (B, 1, C) and sentences (B, N, C)."""
    question, sentences = inputs.values()
    return question[:, 0], sentences


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "Sparsemax":
        return Port(Function(partial(sparsemax, dim=args.get("dim", -1))))
    return Port(Head(args["dimensions"]), key_map(AUTHORS), one_question)
