"""RGT's modules: the whole network, both attentions."""

from __future__ import annotations

import re

from saccade import Site
from saccade.papers.rgt import AUTHORS, RECTANGLE, RECURSIVE, TAPS, RectangleWindow, RecursiveGeneralization, rgt
from saccade.tools.verify import find_taps
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args, name = golden["source"]["args"], golden["source"]["object"]
    if name == "RGT":
        model = rgt(args["upscale"], tuple(args["depth"]), args["embed_dim"], args["num_heads"][0],
                    tuple(args["split_size"]), args["mlp_ratio"], args["c_ratio"], args["in_chans"])
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    site, grid = Site(args["dim"], args["num_heads"]), grid_of(golden)
    if name == "RG_SA":
        module = RecursiveGeneralization(site, args["c_ratio"], args["qkv_bias"])
        return Port(module, key_map(RECURSIVE), as_grid(grid), as_tokens)
    index, odd = args["idx"], args["rs_id"] % 2
    module = RectangleWindow(site, tuple(args["split_size"]), index % 4 == (0 if odd else 2), args["qkv_bias"])
    return Port(module, key_map(RECTANGLE), as_grid(grid), as_tokens)


def grid_of(golden: dict) -> tuple[int, ...]:
    """The sides stand in the note alone: "call (x, 14, 19)"."""
    called = re.search(r"\(x, (\d+), (\d+)\)", golden["note"])
    return tuple(map(int, called.groups()))
