"""FcaFormer's modules: the network, a block with cross tokens, a stage."""

from __future__ import annotations

from typing import Any

from torch import nn

from saccade import Site, create_model
from saccade.core.keymap import within
from saccade.papers.fcaformer import AUTHORS, BLOCK, SIZES, CrossAttention, CrossBlock, CrossStage
from tests.ports.port import Port, as_tokens, key_map


def build(golden: dict) -> Port:
    name, args = golden["source"]["object"], golden["source"]["args"]
    if name in SIZES:
        model = create_model(name, img_size=tuple(golden["inputs"]["x"]["shape"][2:]),
                             num_classes=args.get("num_classes", 1000), in_chans=args.get("in_chans", 3))
        taps = {f"stage{number}": f"stages.{number}.downsample" for number in (1, 2, 3)} | {"stage4": "stages.3"}
        return Port(model, key_map(AUTHORS), taps={what: taps[what] for what in golden["outputs"] if what in taps})
    grid, keep = tuple(args["input_resolution"]), args.get("cab_max_d", 12)
    if name == "FcaBlock":
        block = CrossBlock(*crossing(args["dim"], args["num_heads"], grid, args["inner_depth"], keep),
                           merges=args.get("s_up", True))
        return Port(block, key_map(BLOCK), lambda inputs: (inputs["x"].unflatten(1, grid), inputs.get("s")), pair)
    if name == "FcaLayer":
        blocks = [CrossBlock(*crossing(args["dim_in"], args["num_heads"], grid, index, keep),
                             merges=index < args["depth"] - 1) for index in range(args["depth"])]
        taps = {f"block{index + 1}": f"blocks.{index}" for index in range(args["depth"])}
        return Port(CrossStage(nn.Identity(), blocks, keep), key_map(within(BLOCK, r"blocks\.(\d+)\.", r"blocks.\1.")),
                    lambda inputs: (inputs["x"].unflatten(1, grid),), as_tokens,
                    {what: taps[what] for what in golden["outputs"] if what in taps})
    raise NotImplementedError(name)


def crossing(dim: int, heads: int, grid: tuple[int, ...], index: int, keep: int) -> tuple[Site, CrossAttention]:
    site = Site(dim, heads, index=index, grid=grid)
    return site, CrossAttention(site, min(index, keep))


def pair(result: Any) -> dict[str, Any]:
    x, cross = result
    return {"x": x.flatten(1, -2)} | ({} if cross is None else {"s": cross})
