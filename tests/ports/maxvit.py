"""MaxViT's networks and its two attentions with their MLP."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.maxvit import ATTENTION, AUTHORS, TAPS, BlockAttention, GeluTanh, GridAttention
from saccade.parts.block import Block
from saccade.parts.mlp import Mlp
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    if what.startswith("PartitionAttention"):
        site = Site(args["dim"], args["dim"] // args.get("dim_head", 32), grid=tuple(image.shape[1:-1]))
        kind = args.get("partition_type", "block")
        window = tuple(args["window_size" if kind == "block" else "grid_size"])
        mixer = (BlockAttention if kind == "block" else GridAttention)(site, window)
        mlp = partial(Mlp, activation=GeluTanh)
        return Port(Block(site, mixer, norm=partial(nn.LayerNorm, eps=args.get("norm_eps", 1e-5)), mlp=mlp),
                    key_map(ATTENTION))
    common = dict(num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if "img_size" in args:
        common["img_size"] = args["img_size"]
    taps = {name: TAPS[name] for name in golden["outputs"] if name in TAPS}
    return Port(create_model(what, **common), key_map(AUTHORS), taps=taps)
