"""Dynamic Perceiver on MobileNetV3, all four exits."""

from __future__ import annotations

import re

from saccade.papers.dyn_perceiver import AUTHORS, RECORDED, SIZES, TAPS, dyn_perceiver, dyn_perceiver_resnet
from tests.ports.port import Port, key_map

FLAGS = ("spatial_reduction", "with_last_CA", "with_x2z", "with_dwc", "with_z2x", "with_isc")


def build(golden: dict) -> Port:
    source = golden["source"]
    named = re.fullmatch(r"mobilenetV3(?:_(\d)x(\d+))?_perceiver_t(\d+)", source["object"])
    resnet = re.fullmatch(r"(resnet\w+)_perceiver_(t\d+)", source["object"])
    if not (named or resnet) or not all(source["args"].get(flag, flag != "spatial_reduction") for flag in FLAGS):
        raise NotImplementedError(source)
    common = dict(num_classes=source["args"].get("num_classes", 1000), **RECORDED(golden))
    taps = {name: where for name, where in TAPS.items() if name in golden["outputs"] and name != "y_merge"}
    if resnet:
        name = f"dyn_perceiver_{resnet[1]}_{resnet[2]}"
        size = {key: value for key, value in SIZES[name].items() if key != "builder"}
        return Port(dyn_perceiver_resnet(**size, **common), key_map(AUTHORS(name)),
                    outputs=lambda out: {"y_merge": out}, taps=taps)
    width = float(f"{named[1]}.{named[2]}") if named[1] else 1.0
    model = dyn_perceiver(int(named[3]), width, **common)
    return Port(model, key_map(AUTHORS("mobilenet")), outputs=lambda out: {"y_merge": out}, taps=taps)
