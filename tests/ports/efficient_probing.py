"""The poolings, and a probe on a plain transformer."""

from __future__ import annotations

from torch import Tensor, nn

from saccade import create_model
from saccade.core.keymap import within
from saccade.papers.efficient_probing import EFFICIENT, SIMPOOL, EfficientProbing, MeanQuery, Probe, SimPool
from saccade.parts.plain import DEIT
from tests.ports.port import Port, key_map


class Tokens(nn.Module):
    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, image: Tensor) -> Tensor:
        return self.host.forward_features(image)


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "EfficientProbing":
            return Port(EfficientProbing(args["dim"], args["num_queries"], args["d_out"]), key_map(EFFICIENT))
        case "SimPool":
            return Port(SimPool(args["dim"], args.get("gamma")), key_map(SIMPOOL))
        case "SimPool_nolinears":
            return Port(MeanQuery(args["dim"], args["num_heads"]), key_map(SIMPOOL))
    name = args["encoder"].removeprefix("timm ")
    host = create_model(name, num_classes=0)
    probe = Probe(Tokens(host), host.num_features, args["nb_classes"], queries=args["ep_queries"], shrink=args["d_out"])
    rules = (*within(EFFICIENT, r"head\.0\.", "head.0."), (r"head\.(.*)", r"head.\1"),
             *within(DEIT, r"encoder\.", "encoder.host."), (r"encoder\.(.*)", r"encoder.host.\1"))
    return Port(probe.eval(), key_map(rules))
