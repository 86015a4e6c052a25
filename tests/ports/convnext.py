"""ConvNeXt's network (hierarchical and isotropic) and block."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.convnext import AUTHORS, Depthwise, convnext, convnext_isotropic
from saccade.parts.block import SingleBlock
from tests.ports.port import Port, channels_first, channels_last, key_map

BLOCK = ((r"dwconv\.(.*)", r"mixer.conv.\1"), (r"pwconv(\d)\.(.*)", r"mlp.fc\1.\2"), ("gamma", "scale.0.gamma"))


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    scale = args.get("layer_scale_init_value", 1e-6) or None
    if what == "Block":
        site = Site(args["dim"], grid=tuple(golden["inputs"]["x"]["shape"][2:]))
        block = SingleBlock(site, Depthwise(site), layer_scale=scale)
        return Port(block, key_map(BLOCK), channels_last, channels_first)
    size = tuple(next(iter(make_inputs(golden).values())).shape[2:])
    common = dict(img_size=size, num_classes=args.get("num_classes", 1000), in_chans=args.get("in_chans", 3))
    match what:
        case "ConvNeXt":
            model = convnext(tuple(args.get("dims", (96, 192, 384, 768))), tuple(args.get("depths", (3, 3, 9, 3))),
                             layer_scale=scale, **common)
        case "ConvNeXtIsotropic":
            gammas = any(name.endswith("gamma") for name, *_ in golden["state"])
            model = convnext_isotropic(args.get("dim", 384), args.get("depth", 18),
                                       layer_scale=1e-6 if gammas else None, **common)
        case factory:
            model = create_model(factory, **common)
    taps = {name: name.replace("stage", "stages.") for name in golden["outputs"] if name != "out"}
    return Port(model, key_map(AUTHORS), taps=taps)
