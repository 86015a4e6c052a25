"""HaloNet's modules: the networks, the attention."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.papers.halonet import ATTENTION, AUTHORS, SIZES, TAPS, HaloAttention
from saccade.parts.squeeze import divisible
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    name, args = golden["source"]["object"], golden["source"]["args"]
    if name in SIZES:
        model = create_model(name, num_classes=args.get("num_classes", 1000), in_chans=args.get("in_chans", 3))
        return Port(model, key_map(AUTHORS), taps={what: TAPS[what] for what in golden["outputs"] if what in TAPS})
    if name == "HaloAttn":
        heads, out_dim = args.get("num_heads", 8), args.get("dim_out") or args["dim"]
        width = args.get("dim_head") or divisible(out_dim * args.get("qk_ratio", 1.0)) // heads
        grid = tuple(golden["inputs"]["x"]["shape"][2:])
        attention = HaloAttention(
            Site(args["dim"], heads, grid=grid), args.get("block_size", 8), args.get("halo_size", 3),
            args.get("stride", 1), out_dim, width, args.get("qkv_bias", False), args.get("avg_down", False),
            args.get("scale_pos_embed", False),
        )
        return Port(attention, key_map(ATTENTION), channels_last, channels_first)
    raise NotImplementedError(name)
