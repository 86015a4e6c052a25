"""SpectFormer's networks, plain and hierarchical, and its spectral gate."""

from __future__ import annotations

import re
from math import isqrt

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.spectformer import AUTHORS, MIXER, SpectralGating, spectformer
from saccade.tools.verify import taps
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "SpectralGatingNetwork":
        side = isqrt(x.shape[1])  # the authors take tokens for a square
        grid = (side, x.shape[1] // side)
        return Port(SpectralGating(Site(args["dim"], grid=grid)), key_map(MIXER), as_grid(grid), as_tokens)
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    if what == "SpectFormer":  # six heads, whatever the width
        model = spectformer(args.get("embed_dim", 384), args.get("depth", 12), heads=6,
                            patch=args.get("patch_size", 16), **common)
        places = {r"filter(\d+)": r"blocks.\1.mixer", r"block(\d+)": r"blocks.\1",
                  "block_last": f"blocks.{len(model.blocks) - 1}"}
        found = {name: re.sub(pattern, place, name) for name in golden["outputs"] for pattern, place in places.items()
                 if re.fullmatch(pattern, name)}
        return Port(model, key_map(AUTHORS), taps=found)
    name = what.replace("spectformer_", "spectformer_h_")
    return Port(create_model(name, **common), key_map(AUTHORS), taps=taps(name, golden))
