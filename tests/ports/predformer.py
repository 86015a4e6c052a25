"""PredFormer's networks."""

from __future__ import annotations

import re
from pathlib import PurePath

from saccade.papers.predformer import VARIANTS, key_map, predformer
from tests.ports.port import Port
from tests.ports.port import key_map as renaming


def build(golden: dict) -> Port:
    source = golden["source"]
    args = source["args"]
    # The authors have a file a variant: PredFormer_Quadruplet_TSST.py, PredFormer_FacST.py, PredFormer_FullAttention.py
    stem = re.sub("^quadruplet_", "", PurePath(source["file"]).stem.removeprefix("PredFormer_").lower())
    variant = next(one for one in VARIANTS if one.replace("_", "") == stem.replace("attention", "").replace("_", ""))
    model = predformer(
        variant, args["Ndepth"], args["dim"], args["heads"], args["patch_size"], args["scale_dim"], args["depth"],
        in_chans=args["pre_seq"], img_size=(args["num_channels"], args["height"], args["width"]),
    )
    taps = {f"block{number}": f"blocks.{number}" for number in range(len(model.blocks))}
    found = {name: taps[name] for name in golden["outputs"] if name in taps}
    return Port(model, renaming(key_map(variant)), taps=found)
