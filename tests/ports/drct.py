"""DRCT's modules: the whole network, a dense group."""

from __future__ import annotations

from saccade import Site
from saccade.papers.drct import AUTHORS, GROUP, TAPS, DenseGroup, drct
from saccade.tools.verify import find_taps
from tests.ports.hat import grid_of
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "DRCT":
        model = drct(args["upscale"], len(args["depths"]), args["embed_dim"], args["num_heads"][0], args["window_size"],
                     args["gc"], args["mlp_ratio"], args["in_chans"])
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    window = min(args["window_size"], *args["input_resolution"])
    module = DenseGroup(Site(args["dim"], args["num_heads"]), window, args["gc"], args["mlp_ratio"])
    return Port(module, key_map(GROUP), as_grid(grid_of(golden["inputs"]["x"]["shape"][1])), as_tokens)
