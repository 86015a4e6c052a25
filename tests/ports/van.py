"""VAN's networks, its attention and the gate inside."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.van import AUTHORS, GATE, MIXER, TAPS, LargeKernel, LargeKernelAttention, van
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "LKA":
        return Port(LargeKernel(2, args["dim"]), key_map(GATE), channels_last, channels_first)
    if what == "Attention":
        mixer = LargeKernelAttention(Site(args["d_model"], grid=tuple(image.shape[2:])))
        return Port(mixer, key_map(MIXER), channels_last, channels_first)
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "VAN":
        model = van(args["embed_dims"], args["depths"], args.get("mlp_ratios", (8, 8, 4, 4)), **common)
    else:
        model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps={name: TAPS[name] for name in golden["outputs"] if name in TAPS})
