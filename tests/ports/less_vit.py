"""LESS ViT: the network, its low-rank attention and its block."""

from __future__ import annotations

from math import isqrt

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.less_vit import (
    AUTHORS,
    BLOCK,
    RECORDED,
    TAPS,
    LessAttention,
    LowRankAttention,
    less_vit,
    perception_field,
)
from saccade.parts.block import Block
from saccade.tools.verify import find_taps
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
    if what == "SpatialSpectralLowRankViTEncoder":
        image = next(iter(make_inputs(golden).values()))
        model = less_vit(
            args["embed_dim"], args["depth"], args["num_heads"], args.get("channel_embed_dims_per_head", 4),
            args.get("rank", 1), args["patch_size"], radar=True, num_classes=0, global_pool="", **RECORDED(golden),
            in_chans=image.shape[1], img_size=tuple(image.shape[2:]))
        return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    if what != "LowRankBlock":
        raise NotImplementedError(what)
    x = next(iter(make_inputs(golden).values()))
    site = Site(args["dim"], args["num_heads"], grid=tuple(x.shape[1:-1]))
    mixer = LessAttention(site, args["channel_dim"] // args["num_heads"], **options)
    return Port(Block(site, mixer), key_map(BLOCK))
