"""SiT's transformer with its two heads, as recorded: the projection and the restored picture of an image."""

from __future__ import annotations

import re

from torch import Tensor

from saccade.core.build import create_model
from saccade.papers.sit_ssl import AUTHORS, SelfSupervisedTransformer
from tests.ports.port import Port, key_map


class Recorded(SelfSupervisedTransformer):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        token, restored = self.read(image)
        return self.project(token), restored


def build(golden: dict) -> Port:
    args = golden["source"]["args"]["cls_head"]
    size = re.search(r"vit_(\w+)", golden["source"]["object"])[1]
    host = create_model(f"vit_{size}_patch16_224", num_classes=0)
    module = Recorded(host, out_dim=args["bottleneck_dim"], hidden=args["hidden_dim"])
    del module.turn, module.weights
    taps = {name: name.replace("block", "model.blocks.") for name in golden["outputs"] if name.startswith("block")}
    return Port(module, key_map(AUTHORS), outputs=lambda result: dict(zip(("out0", "out1"), result)), taps=taps)
