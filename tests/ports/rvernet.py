"""RveRNet with torchvision's networks on its sides."""

from __future__ import annotations

from saccade.papers.rvernet import authors_names, rvernet
from tests.ports.port import Port, key_map

OURS = {"mobilenet_v2": "mobilenet_v2", "vit_b_16": "vit_base_patch16_224"}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    names = [OURS[args[side].removeprefix("torchvision ")] for side in ("backbone1", "backbone2")]
    model = rvernet(*names, num_classes=args["output_size"], img_size=args["input_size"])
    return Port(model, key_map(authors_names(*names)), outputs=lambda out: {next(iter(golden["outputs"])): out})
