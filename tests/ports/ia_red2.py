"""IA-RED2's modules: the whole network, an interpreter."""

from __future__ import annotations

from saccade.papers.ia_red2 import RECORDED, Interpreter, authors_names, ia_red2_deit, taps
from saccade.tools.verify import find_taps
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "PerBlockAgent":
        return Port(Interpreter(args["dim"], args["num_heads"]), key_map(()))
    vit, layers = args["vit"], RECORDED(golden)["layers"]
    model = ia_red2_deit(vit["embed_dim"], vit["depth"], vit["num_heads"], patch=vit["patch_size"],
                         img_size=vit["img_size"], num_classes=vit.get("num_classes", 1000), layers=layers)
    return Port(model, key_map(authors_names(layers)), taps=find_taps(taps(layers), golden))
