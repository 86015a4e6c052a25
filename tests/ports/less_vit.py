"""LESS ViT's low-rank attention and its block."""

from __future__ import annotations

from math import isqrt

from saccade import Site
from saccade.papers.less_vit import AUTHORS, LessAttention, LowRankAttention, perception_field
from saccade.parts.block import Block
from saccade.tools.golden import make_inputs
from tests.ports.port import Port, State, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    options = dict(rank=args.get("rank", 1), qkv_bias=args.get("qkv_bias", False), qk_norm=args.get("qk_norm", False))
    if what == "LowRankAttention":
        def masked(inputs: State):
            bands, places = inputs["xc"], inputs["xs"]
            side = isqrt(places.shape[1])  # the golden's note: 10 units, of which a step is 4
            return bands, places, perception_field((side, side), 10 / 4, places.dtype, places.device)
        widths = (args["dim"], args["num_heads"], args["channel_dim"], args["spatial_dim"])
        attention = LowRankAttention(*widths, **options)
        return Port(attention, key_map(()), masked)
    if what != "LowRankBlock":
        raise NotImplementedError(what)
    x = next(iter(make_inputs(golden).values()))
    site = Site(args["dim"], args["num_heads"], grid=tuple(x.shape[1:-1]))
    mixer = LessAttention(site, args["channel_dim"] // args["num_heads"], **options)
    return Port(Block(site, mixer), key_map(AUTHORS))
