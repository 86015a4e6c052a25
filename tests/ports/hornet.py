"""HorNet's networks, g^nConv and its global-local filter."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.hornet import AUTHORS, FILTER, MIXER, GatedConvolution, GlobalLocalFilter
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    native = (args["h"], 2 * (args["w"] - 1)) if "h" in args else tuple(image.shape[2:])
    if what == "GlobalLocalFilter":
        return Port(GlobalLocalFilter(native, args["dim"]), key_map(FILTER), channels_last, channels_first)
    if what == "gnconv":
        mixer = GatedConvolution(Site(args["dim"], grid=native), args.get("order", 5), args.get("s", 1.0),
                                 "gflayer" in args)
        return Port(mixer, key_map(MIXER), channels_last, channels_first)
    common = dict(num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    model = create_model(what, **common)  # at the native size: the filters belong to it, whatever image comes
    taps = {name: name.replace("stage", "stages.") for name in golden["outputs"] if name.startswith("stage")}
    return Port(model, key_map(AUTHORS), taps=taps)
