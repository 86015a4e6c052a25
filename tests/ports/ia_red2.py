"""IA-RED2's modules: the whole network, an interpreter."""

from __future__ import annotations

from saccade.core.keymap import Dropped
from saccade.papers.ia_red2 import RECORDED, Interpreter, ia_red2_deit
from saccade.parts.plain import DEIT
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "PerBlockAgent":
        return Port(Interpreter(args["dim"], args["num_heads"]), key_map(()))
    vit, firsts = args["vit"], RECORDED(golden)["layers"]
    model = ia_red2_deit(vit["embed_dim"], vit["depth"], vit["num_heads"], patch=vit["patch_size"],
                         img_size=vit["img_size"], num_classes=vit.get("num_classes", 1000), **RECORDED(golden))
    names = (
        Dropped(r"groups\.\d+\.block_list\..*", "the blocks once more"),
        *((rf"groups\.{group}\.agent\.(.*)", rf"blocks.{first}.interpreter.\1") for group, first in enumerate(firsts)),
        *DEIT,
    )
    return Port(model, key_map(names), taps={f"prob{group}": f"blocks.{first}.watched" for group, first in
                                             enumerate(firsts) if f"prob{group}" in golden["outputs"]})
