"""PVT's networks and spatial-reduction attention (of both versions, which share their code)."""

from __future__ import annotations

import re

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.pvt import AUTHORS, MIXER, SpatialReduction, pvt
from tests.ports.port import Port, as_grid, as_tokens, key_map


def grid_of(note: str) -> tuple[int, int]:
    """The grid of an attention stands in the note alone: (B, 14*18, C)."""
    height, width = re.search(r"(\d+)\*(\d+)", note).groups()
    return int(height), int(width)


def block_taps(model, golden: dict) -> dict[str, str]:
    """The authors' hooks are on the last block of each stage."""
    taps = {f"stage{number + 1}": f"stages.{number}.blocks.{len(stage.blocks) - 1}"
            for number, stage in enumerate(model.stages)}
    return {name: taps[name] for name in golden["outputs"] if name in taps}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "Attention":
        grid = grid_of(golden["note"])
        site = Site(args["dim"], args["num_heads"], grid=grid)
        mixer = SpatialReduction(site, args.get("sr_ratio", 1), args.get("qkv_bias", False))
        return Port(mixer, key_map(MIXER), as_grid(grid), as_tokens)
    image = next(iter(make_inputs(golden).values()))
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "PyramidVisionTransformer":
        model = pvt(args["embed_dims"], args["depths"], args["num_heads"], args["mlp_ratios"], args["sr_ratios"],
                    qkv_bias=args.get("qkv_bias", False), **common)
    else:
        model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps=block_taps(model, golden))
