"""FocalNet's networks and focal modulation."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.focalnet import AUTHORS, MIXER, FocalModulation, focalnet
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "FocalModulation":
        mixer = FocalModulation(Site(args["dim"], grid=tuple(x.shape[1:-1])), args["focal_window"], args["focal_level"],
                                args.get("normalize_modulator", False), args.get("use_postln_in_modulation", False))
        return Port(mixer, key_map(MIXER))
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    levels = args.get("focal_levels", [None])[0]
    if what == "FocalNet":
        depths = tuple(args["depths"])
        scaled = args.get("use_layerscale", False)
        model = focalnet(
            tuple(args["embed_dim"] * 2**stage for stage in range(len(depths))), depths,
            args.get("focal_windows", [3])[0], levels or 2, args.get("patch_size", 4),
            args.get("use_conv_embed", False), args.get("use_postln", False),
            args.get("use_postln_in_modulation", False), args.get("normalize_modulator", False),
            args.get("layerscale_value", 1e-4) if scaled else None, **common)
    else:
        model = create_model(what, **common, **({"levels": levels} if levels else {}))
    last = len(model.stages)
    taps = {f"stage{number}": f"stages.{number}.downsample" for number in range(1, last)}
    taps[f"stage{last}"] = f"stages.{last - 1}"
    return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
