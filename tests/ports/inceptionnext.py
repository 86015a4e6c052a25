"""InceptionNeXt's networks and its mixer."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.inceptionnext import AUTHORS, MIXER, InceptionDepthwise, inceptionnext
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "InceptionDWConv2d":
        site = Site(args["in_channels"], grid=tuple(image.shape[2:]))
        mixer = InceptionDepthwise(site, args.get("band_kernel_size", 11), args.get("branch_ratio", 0.125),
                                   args.get("square_kernel_size", 3))
        return Port(mixer, key_map(MIXER), channels_last, channels_first)
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "MetaNeXt":
        ratios = args.get("mlp_ratios", (4, 4, 4, 3))
        model = inceptionnext(tuple(args["dims"]), tuple(args["depths"]), mlp_ratios=tuple(ratios), **common)
    else:
        model = create_model(what, **common)
    taps = {name: name.replace("stage", "stages.") for name in golden["outputs"] if name.startswith("stage")}
    return Port(model, key_map(AUTHORS), taps=taps)
