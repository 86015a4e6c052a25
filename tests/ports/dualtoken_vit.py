"""The parts that DualToken-ViT shares with LightViT: stem, patch merging, bi-dimensional gates."""

from __future__ import annotations

import re
from math import isqrt

import torch
from torch import Tensor

from saccade.core.keymap import within
from saccade.golden import make_inputs
from saccade.papers.dualtoken_vit import GATE, MERGING, STEM, BiDimensionalGate, ResidualMerging, stem
from tests.ports.port import Port, as_tokens, key_map


def grid_of(note: str, count: int) -> tuple[int, int]:
    """The grid of the tokens stands in the note alone ("The 7x10 map"); else they are taken for a square."""
    for height, width in re.findall(r"(\d+)\s*x\s*(\d+)", note):
        if int(height) * int(width) == count:
            return int(height), int(width)
    return isqrt(count), count // isqrt(count)


def joined(result: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Global tokens first, as the authors have them."""
    x, tokens = result
    return {"out": torch.cat([tokens, x.flatten(1, -2)], 1)}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    # The goldens' modules may stand inside one more ("m.", "stem.").
    outer = {"ResidualMergePatch": r"(?:m\.)?", "ConvStem": r"(?:stem\.(?=stem|proj|norm))?"}.get(what, "")
    match what:
        case "BiAttn":
            gate = BiDimensionalGate(args["in_channels"], args.get("act_ratio", 0.25))
            return Port(gate, key_map(GATE))
        case "ResidualMergePatch":
            count = args["num_tokens"]
            grid = grid_of(golden["note"], x.shape[1] - count)
            return Port(ResidualMerging(2, args["dim"], args["out_dim"]), key_map(within(MERGING, outer, "")),
                        lambda inputs: (inputs["x"][:, count:].unflatten(1, grid), inputs["x"][:, :count]),
                        joined)
        case "ConvStem":
            return Port(stem(2, x.shape[1], args["embed_dim"]), key_map(within(STEM, outer, "")), outputs=as_tokens)
    raise NotImplementedError(what)
