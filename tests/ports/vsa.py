"""VSA: ViTAEv2 with it, and the attention alone."""

from __future__ import annotations

from saccade import Site
from saccade.papers.vsa import AUTHORS, MIXER, SIZES, TAPS, VariedSizeWindow, vsa
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "ViTAEv2_VSA_S":
            model = vsa(**SIZES["vitaev2_vsa_s"], num_classes=args.get("num_classes", 1000),
                        img_size=args.get("img_size", 224))
            return Port(model, key_map(AUTHORS), taps={name: TAPS[name] for name in golden["outputs"] if name in TAPS})
        case "VSAWindowAttention":
            site = Site(args["dim"], args["num_heads"], grid=tuple(args["img_size"]))
            mixer = VariedSizeWindow(site, args.get("window_size", 7), args.get("out_dim"), args.get("qkv_bias", True))
            return Port(mixer, key_map(MIXER), channels_last, channels_first)
    raise NotImplementedError(golden["source"]["object"])
