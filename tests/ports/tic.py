"""The published layer of TiC; torch's counter, like the authors' form, sees no product in shifts that are summed."""

from __future__ import annotations

from saccade.golden import make_inputs
from saccade.papers.tic import LAYER, MsaConv
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] != "MSA_Conv_2d":
        raise NotImplementedError(golden["source"]["object"])
    rank = next(iter(make_inputs(golden).values())).ndim - 2
    layer = MsaConv(rank, args["input_channel"], args["output_channel"], args["kernel_size"],
                    stride=args.get("stride", 1), dilation=args.get("dilation", 1), padding=args.get("padding", 1),
                    bias=args.get("bias", False))
    return Port(layer, key_map(LAYER), channels_last, channels_first)
