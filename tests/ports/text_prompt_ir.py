"""TextPromptIR's modules: the whole network, a prompted attention."""

from __future__ import annotations

import re

from saccade.papers.text_prompt_ir import AUTHORS, Prompted, prompted, text_prompt_ir
from saccade.parts.restoration.transposed import TRANSPOSED, TransposedAttention
from tests.ports.port import Port, key_map, unused


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "Attention":
        dim, number = args["dim"], int(re.search(r"num=(\d)", golden["note"])[1])
        module = Prompted(dim, TransposedAttention(dim, args["num_heads"], args["bias"]))
        rules = prompted(number, TRANSPOSED)
        return Port(module, key_map(rules), lambda inputs: (inputs["x"].movedim(1, -1), inputs["embedding"]),
                    lambda result: {"out": result.movedim(-1, 1)}, unused=unused(golden, rules))
    model = text_prompt_ir(depths=args["num_blocks"], refine=args["num_refinement_blocks"])
    return Port(model, key_map(AUTHORS), lambda inputs: (inputs["img"], inputs["embedding"]),
                unused=unused(golden, AUTHORS))
