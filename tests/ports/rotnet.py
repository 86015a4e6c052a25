"""RotNet's networks and the turned pictures."""

from __future__ import annotations

from saccade.papers.rotnet import AUTHORS, TAPS, rotations, rotnet_alexnet, rotnet_nin
from saccade.tools.verify import find_taps
from tests.ports.port import Function, Port, key_map


def build(golden: dict) -> Port:
    source, args = golden["source"], golden["source"]["args"]
    if source["object"] == "rotate_img":
        return Port(Function(rotations), key_map(()))
    if source["file"].endswith("AlexNet.py"):
        model = rotnet_alexnet(args["num_classes"])
    else:
        model = rotnet_nin(args["num_stages"], args.get("use_avg_on_conv3", True), args["num_classes"])
    taps = {name: place for name, place in find_taps(TAPS, golden).items() if name != "classifier"}
    return Port(model.eval(), key_map(AUTHORS), outputs=lambda result: {"classifier": result}, taps=taps)
