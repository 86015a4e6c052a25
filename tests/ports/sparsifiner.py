"""Sparsifiner's modules: the whole network, a mask predictor."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from saccade.papers.sparsifiner import AUTHORS, RECORDED, TAPS, MaskPredictor, sparsifiner_deit
from saccade.tools.verify import find_taps
from tests.ports.port import Port, key_map

PREDICTOR = ((r"proj_n", "squeeze"), (r"proj_back_n", "spread"), (r"proj_c_([qk])\.(.*)", r"\1.\2"))


class Predicted(nn.Module):
    """What the authors' predictor returns: the map, the coefficients, the mask with the class token's row."""

    def __init__(self, args: dict) -> None:
        super().__init__()
        self.keep, self.count = args["attn_keep_rate"], args["num_tokens"]
        self.inner = MaskPredictor((self.count - 1,), 1, args["dim"] // args["num_heads"], args["reduce_n_factor"],
                                   args["reduce_c_factor"])

    def forward(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        grid = (self.count - 1,)
        coefficients = self.inner.coefficients(q, k, grid)
        guess = self.inner.written(coefficients, grid)
        mask = torch.zeros_like(guess).scatter(-1, guess.topk(ceil(self.keep * self.count), -1).indices, 1.0)
        return {"approx_attn": guess, "basis_coef": coefficients,
                "attn_mask": torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2)}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "MaskPredictor":
        names = tuple((theirs, f"inner.{ours}") for theirs, ours in PREDICTOR)
        return Port(Predicted(args), key_map(names), outputs=lambda found: found)
    model = sparsifiner_deit(args["embed_dim"], args["depth"], args["num_heads"], patch=args["patch_size"],
                             img_size=args["img_size"], num_classes=args.get("num_classes", 1000), **RECORDED(golden))
    return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
