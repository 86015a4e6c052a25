"""SASRec: scores of candidates and the features of all places."""

from __future__ import annotations

from torch import Tensor

from saccade.papers.sasrec import AUTHORS, SASRec
from tests.ports.port import Port, State, key_map


class Both(SASRec):
    """What the golden holds: it ran the network once for the scores, and once for the features."""

    def forward(self, history: Tensor, candidates: Tensor | None = None) -> State:
        return {"logits": super().forward(history, candidates), "feats": self.features(history)}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    module = Both(args["item_num"], args["maxlen"], args["hidden_units"], args["num_blocks"], args["num_heads"],
                  args.get("dropout_rate", 0.2), args.get("norm_first", False))
    return Port(module, key_map(AUTHORS))
