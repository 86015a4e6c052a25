"""HAT's modules: the whole network, a hybrid block, overlapping cross-attention, channel attention."""

from __future__ import annotations

from saccade import Site
from saccade.papers.hat import (
    AUTHORS,
    BLOCK,
    CAB,
    OVERLAPPING,
    TAPS,
    HybridBlock,
    OverlappingBlock,
    channel_attention,
    hat,
)
from saccade.tools.verify import find_taps
from tests.ports.port import Port, as_grid, as_tokens, channels_first, channels_last, key_map

FIELDS = dict(upscale="scale", embed_dim="dim", depths="depths", num_heads="heads", window_size="window",
              compress_ratio="compress", squeeze_factor="squeeze", conv_scale="alpha", overlap_ratio="overlap",
              mlp_ratio="ratio", in_chans="in_chans")


def build(golden: dict) -> Port:
    args, shape = golden["source"]["args"], golden["inputs"]["x"]["shape"]
    match golden["source"]["object"]:
        case "CAB":
            module = channel_attention(args["num_feat"], args.get("compress_ratio", 3), args.get("squeeze_factor", 30))
            return Port(module, key_map(CAB), channels_last, channels_first)
        case "HAT":
            model = hat(**{FIELDS[name]: value for name, value in args.items() if name in FIELDS})
            return Port(model, key_map(AUTHORS), taps=find_taps(TAPS, golden))
    site = Site(args["dim"], args["num_heads"])
    grid = grid_of(shape[1])
    if golden["source"]["object"] == "HAB":
        window, shift = args.get("window_size", 7), args.get("shift_size", 0)
        if min(args["input_resolution"]) <= window:
            window, shift = min(args["input_resolution"]), 0
        module = HybridBlock(site, window, shift, args.get("compress_ratio", 3), args.get("squeeze_factor", 30),
                             args.get("conv_scale", 0.01), args.get("mlp_ratio", 4.0))
        return Port(module, key_map(BLOCK), as_grid(grid), as_tokens)
    module = OverlappingBlock(site, args["window_size"], args["overlap_ratio"], args.get("mlp_ratio", 2))
    return Port(module, key_map(OVERLAPPING), as_grid(grid), as_tokens)


def grid_of(tokens: int) -> tuple[int, int]:
    """The grid of whole windows nearest to a square, the longer side last: 384 is 16 x 24 (the notes say so)."""
    rows = max(side for side in range(8, tokens) if tokens % side == 0 and side * side <= tokens and side % 8 == 0)
    return rows, tokens // rows
