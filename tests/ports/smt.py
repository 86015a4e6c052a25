"""SMT's networks, its modulation and its attention."""

from __future__ import annotations

import re

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.smt import ATTENTION, AUTHORS, MODULATION, TAPS, LocalValueAttention, ScaleAwareModulation
from tests.ports.port import Port, as_grid, as_tokens, key_map


def grid_of(note: str) -> tuple[int, int]:
    """The grid stands in the note alone: "H=13 W=18"."""
    height, width = re.search(r"H=(\d+) W=(\d+)", note).groups()
    return int(height), int(width)


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "Attention":
        grid = grid_of(golden["note"])
        bias = args.get("qkv_bias", False)
        if args.get("ca_attention", 1):
            site = Site(args["dim"], grid=grid)
            mixer = ScaleAwareModulation(site, args["ca_num_heads"], args.get("expand_ratio", 2), bias)
            return Port(mixer, key_map(MODULATION), as_grid(grid), as_tokens)
        mixer = LocalValueAttention(Site(args["dim"], args["sa_num_heads"], grid=grid), qkv_bias=bias)
        return Port(mixer, key_map(ATTENTION), as_grid(grid), as_tokens)
    image = next(iter(make_inputs(golden).values()))
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps={name: TAPS[name] for name in golden["outputs"] if name in TAPS})
