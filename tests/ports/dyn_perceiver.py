"""Dynamic Perceiver on MobileNetV3, all four exits."""

from __future__ import annotations

import re

from saccade.papers.dyn_perceiver import AUTHORS, RECORDED, TAPS, dyn_perceiver
from tests.ports.port import Port, key_map

FLAGS = ("spatial_reduction", "with_last_CA", "with_x2z", "with_dwc", "with_z2x", "with_isc")


def build(golden: dict) -> Port:
    source = golden["source"]
    named = re.fullmatch(r"mobilenetV3(?:_(\d)x(\d+))?_perceiver_t(\d+)", source["object"])
    if named is None or not all(source["args"].get(flag, flag != "spatial_reduction") for flag in FLAGS):
        raise NotImplementedError(source)
    width = float(f"{named[1]}.{named[2]}") if named[1] else 1.0
    model = dyn_perceiver(int(named[3]), width, num_classes=source["args"].get("num_classes", 1000), **RECORDED(golden))
    return Port(model, key_map(AUTHORS), outputs=lambda out: {"y_merge": out},
                taps={name: where for name, where in TAPS.items() if name in golden["outputs"] and name != "y_merge"})
