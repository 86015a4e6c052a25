"""TVConv's networks, inverted residual and operator."""

from __future__ import annotations

import re

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.tvconv import AUTHORS, OPERATOR, TAPS, TVConv, tvconv
from saccade.parts.mobilenet import InvertedBlock, inverted_names
from tests.ports.port import Port, channels_first, channels_last, key_map


def settings(args: dict, width: int = 16, layers: int = 1) -> dict:
    """The operator's settings from the authors' names for them."""
    return dict(kernel=args.get("TVConv_k", 3), channels=args.get("TVConv_posi_chans", 4),
                width=args.get("TVConv_inter_chans", width), layers=args.get("TVConv_inter_layers", layers),
                bias=bool(args.get("TVConv_Bias", False)))


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "TVConv":
        site = Site(args["channels"], grid=(args.get("h", 3), args.get("w", 3)))
        mixer = TVConv(site, stride=args.get("stride", 1), **settings(args))
        return Port(mixer, key_map(OPERATOR), channels_last, channels_first)
    if what == "TVConvInvertedResidual":
        ratio, stride = args["expand_ratio"], args["stride"]
        site = Site(round(args["inp"] * ratio), grid=(args["h_w"],) * 2)
        block = InvertedBlock(site, TVConv(site, stride=stride, **settings(args)), args["inp"], args["oup"], stride)
        return Port(block, key_map(inverted_names(ratio != 1, stride, OPERATOR)), channels_last, channels_first)
    whole, tenth = re.fullmatch(r"mobilenet_v2_x(\d)_(\d)", what).groups()
    model = tvconv(int(whole) + int(tenth) / 10, num_classes=args.get("embedding_size", 512),
                   img_size=tuple(args.get("input_size", image.shape[2:])), **settings(args))
    taps = {name: TAPS[name] for name in golden["outputs"] if name in TAPS}
    return Port(model, key_map(AUTHORS), taps=taps)
