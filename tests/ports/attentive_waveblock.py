"""Attentive WaveBlock's modules: the network, the wave, and it with attention before or after."""

from __future__ import annotations

from torch import nn

from saccade import create_model
from saccade.core.keymap import within
from saccade.papers.attentive_waveblock import _CBAM, _NON_LOCAL, AUTHORS, Cbam, NonLocal, wave
from tests.ports.port import Port, channels_first, channels_last, key_map


class Around(nn.Module):
    """The wave at a given row, after or before attention."""

    def __init__(self, start: int, cbam: nn.Module | None = None, non_local: nn.Module | None = None) -> None:
        super().__init__()
        self.start, self.cbam, self.non_local = start, cbam, non_local

    def forward(self, x):
        x = wave(x if self.cbam is None else self.cbam(x) + x, self.start)
        return x if self.non_local is None else self.non_local(x)


def build(golden: dict) -> Port:
    source = golden["source"]
    args = source["args"]
    match source["object"]:
        case "ResNet":
            kind = "post" if "post" in source["file"] else "pre"
            model = create_model(f"awb_resnet{args['depth']}_{kind}_a", num_classes=args.get("num_classes", 0))
            taps = {"cbam_1": "stages.1.norm.attention", "cbam_2": "stages.2.norm.attention",
                    "non_local_1": "stages.1.norm.attention", "non_local_2": "stages.2.norm.attention"}
            return Port(model, key_map(AUTHORS), taps={k: v for k, v in taps.items() if k in golden["outputs"]})
        case "waveblock":
            return Port(Around(args["sx"]), key_map(()), channels_last, channels_first)
        case "CBAM + waveblock":
            around = Around(args["sx"], Cbam(2, args["channels"], args.get("reduction_ratio", 16)))
            return Port(around, key_map(within(_CBAM, r"cbam\.", "cbam.")), channels_last, channels_first)
        case "waveblock + NONLocalBlock2D":
            non_local = NonLocal(args["channels"])
            around = Around(args["sx"], non_local=non_local)
            around.cost = non_local.cost
            names = within(_NON_LOCAL, r"non_local\.", "non_local.")
            return Port(around, key_map(names), channels_last, channels_first)
    raise NotImplementedError(source["object"])
