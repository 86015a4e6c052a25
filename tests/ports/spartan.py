"""SpaRTAN's networks and its two mixers."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.spartan import CHANNEL, SPATIAL, MultiOrderSpatial, WaveAggregation, authors, spartan
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what == "SMixer":
        site = Site(args["in_dim"], grid=tuple(image.shape[2:]))
        return Port(MultiOrderSpatial(site, args["groups"]), key_map(SPATIAL), channels_last, channels_first)
    if what == "CMixer":
        mixer = WaveAggregation(2, args["in_dim"], args["expand_ratio"], args["groups"] > 1)
        return Port(mixer, key_map(CHANNEL), channels_last, channels_first)
    if what == "SpaRTAN":
        depths = args["layer_depths"]
        model = spartan((args.get("init_dim", 32), *args["dims"]), depths, args["expand_ratios"],
                        img_size=tuple(image.shape[2:]), num_classes=args["num_classes"])
        taps = {"stem": "stem"} | {f"stage{stage}": f"stages.{stage}" for stage in range(len(depths))}
        return Port(model, key_map(authors(depths)),
                    taps={name: taps[name] for name in golden["outputs"] if name in taps})
    raise NotImplementedError(what)
