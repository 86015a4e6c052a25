"""IBN-Net's modules: the networks, the norm."""

from __future__ import annotations

import re

from saccade import create_model
from saccade.papers.ibn_net import AUTHORS, TAPS, InstanceBatchNorm
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    source = golden["source"]
    args = source["args"]
    if source["object"] == "IBN":
        norm = InstanceBatchNorm(args["planes"], args.get("ratio", 0.5), last="densenet" in source["file"])
        return Port(norm, key_map(()), channels_last, channels_first)
    if re.fullmatch(r"(se_)?(resnet|resnext|densenet)\d+_ibn_[ab]", source["object"]):
        model = create_model(source["object"], num_classes=args.get("num_classes", 1000))
        taps = {what: TAPS[what] for what in golden["outputs"] if what in TAPS}
        return Port(model, key_map(AUTHORS), taps=taps)
    raise NotImplementedError(source["object"])
