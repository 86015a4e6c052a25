"""SiT's modules: the whole network, token slimming and its reverse."""

from __future__ import annotations

from saccade.papers.self_slimmed import (
    REVERSE,
    SLIMMING,
    TAPS,
    ReverseSlimming,
    TokenSlimming,
    authors_names,
    sit_lvvit,
)
from saccade.tools.verify import find_taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "TokenSlimmingModule":
            return Port(TokenSlimming(args["dim"], args["keeped_patches"]), key_map(SLIMMING))
        case "ReverseTSM":
            return Port(ReverseSlimming(args["dim"], args["keeped_patches"], args["recovered_patches"]),
                        key_map(REVERSE))
    stages = args["stage_blocks"]
    model = sit_lvvit(args["embed_dim"], stages, args["num_heads"], ratio=args["mlp_ratio"], divisor=args["skip_lam"],
                      patch=args["patch_size"], img_size=args.get("img_size", 224),
                      num_classes=args.get("num_classes", 1000))
    return Port(model, key_map(authors_names(stages)), taps=find_taps(TAPS, golden))
