"""CvT's network and its attention."""

from __future__ import annotations

import re

from torch import Tensor

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.cvt import AUTHORS, MIXER, ConvolutionalProjection, cvt
from saccade.parts.tokens import join
from tests.ports.port import Port, State, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    x = next(iter(make_inputs(golden).values()))
    if golden["source"]["object"] == "Attention":
        return attention(golden, args, x)
    spec = args["spec"]
    model = cvt(tuple(spec["DIM_EMBED"]), tuple(spec["DEPTH"]), tuple(spec["NUM_HEADS"]), spec["PATCH_SIZE"][0],
                spec["PATCH_STRIDE"][0], spec["PATCH_PADDING"][0], spec["MLP_RATIO"][0], spec["QKV_PROJ_METHOD"][0],
                spec["QKV_BIAS"][0], spec["CLS_TOKEN"][-1], img_size=tuple(x.shape[2:]),
                num_classes=args.get("num_classes", 1000), in_chans=x.shape[1])
    taps = {name: f"stages.{int(name[-1]) - 1}" for name in golden["outputs"] if name.startswith("stage")}
    return Port(model, key_map(AUTHORS), taps=taps)


def attention(golden: dict, args: dict, x: Tensor) -> Port:
    """The grid stands in the note alone, as "H=11 W=14" or "11*14"."""
    numbers = re.search(r"H=(\d+) W=(\d+)|(\d+)\*(\d+)", golden["note"])
    grid = tuple(int(number) for number in numbers.groups() if number)
    site = Site(args["dim_out"], args["num_heads"], grid=grid)
    mixer = ConvolutionalProjection(site, args["kernel_size"], args["stride_kv"], args["method"], args["qkv_bias"])
    count = int(args["with_cls_token"])

    def inputs(given: State) -> tuple[Tensor, ...]:
        (tokens,) = given.values()
        grid_tokens = tokens[:, count:].unflatten(1, grid)
        return (grid_tokens, tokens[:, :count]) if count else (grid_tokens,)

    def outputs(result: tuple[Tensor, Tensor] | Tensor) -> State:
        return {"out": join(*result) if count else result.flatten(1, -2)}

    return Port(mixer, key_map(MIXER), inputs, outputs)
