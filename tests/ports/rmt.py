"""RMT's network and its Manhattan self-attention, full and decomposed."""

from __future__ import annotations

import re

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.rmt import AUTHORS, MIXER, SIZES, ManhattanAttention, rmt
from tests.ports.port import Port, key_map

FACTORIES = {"RMT_T3": "rmt_t", "RMT_S": "rmt_s", "RMT_M2": "rmt_b", "RMT_B": "rmt_b", "RMT_L6": "rmt_l"}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what in ("VisionRetentionChunk", "VisionRetentionAll"):
        # The decay is the caller's business in the authors' code: it stands in the note alone.
        said = dict(re.findall(r"(initial_value|heads_range)=([\d.]+)", golden["note"]))
        site = Site(args["embed_dim"], args["num_heads"], grid=tuple(x.shape[1:-1]))
        mixer = ManhattanAttention(site, what.endswith("Chunk"), float(said.get("initial_value", 2)),
                                   float(said.get("heads_range", 4)))
        return Port(mixer, key_map(MIXER))
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    names = {"embed_dims": "dims", "depths": "depths", "num_heads": "heads", "mlp_ratios": "ratios",
             "init_values": "initials", "heads_ranges": "spans", "chunkwise_recurrents": "decomposed",
             "projection": "projection"}
    settings = dict(SIZES[FACTORIES[what]]) if what in FACTORIES else {}
    settings |= {ours: args[name] for name, ours in names.items() if name in args}
    if "layerscales" in args:
        initial = args.get("layer_init_values", 1e-6)
        settings["layer_scales"] = [initial if scaled else None for scaled in args["layerscales"]]
    taps = {f"stage{number}": f"stages.{number}.downsample" for number in (1, 2, 3)} | {"stage4": "stages.3"}
    taps = {name: taps[name] for name in golden["outputs"] if name in taps}
    return Port(rmt(**settings | common), key_map(AUTHORS), taps=taps)
