"""UniFormer's networks, image, light and video, and its blocks."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.uniformer import AUTHORS, BLOCK, DividedBlock, LocalRelation, uniformer
from saccade.parts.attention import Attention
from saccade.parts.axes import AxesAttention
from saccade.parts.block import Block
from saccade.parts.convolution import depthwise
from saccade.parts.mlp import Mlp
from saccade.parts.norm import BatchNorm
from tests.ports.port import Port, channels_first, channels_last, key_map

NETWORKS = ("UniFormer", "UniFormer_Light", "Uniformer", "Uniformer_light")


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what.endswith("Block"):
        site = Site(args["dim"], args.get("num_heads", 1), grid=tuple(x.shape[2:]))
        shared = dict(position=depthwise(site.rank, site.dim, 3), mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4)))
        if what == "CBlock":
            block = Block(site, LocalRelation(site), norm=BatchNorm, **shared)
        elif what == "SplitSABlock":
            block = DividedBlock(site, AxesAttention(site, (1, 2)), norm=nn.LayerNorm, **shared)
            block.norm_time.eps = 1e-5
        else:
            block = Block(site, Attention(site, args.get("qkv_bias", False)), norm=nn.LayerNorm, **shared)
        return Port(block, key_map(BLOCK), channels_last, channels_first)
    common = dict(img_size=tuple(x.shape[2:]), num_classes=args.get("num_classes", 400 if x.ndim == 5 else 1000),
                  in_chans=x.shape[1])
    if what in NETWORKS:
        names = {"embed_dim": "dims", "depth": "depths", "head_dim": "head_dim", "conv_stem": "conv_stem",
                 "split": "divided"}
        settings = dict(dims=[64, 128, 320, 512], depths=[3, 4, 8, 3])
        settings |= {ours: args[name] for name, ours in names.items() if name in args}
        ratio = args.get("mlp_ratio", 4)
        settings["ratio"] = ratio if isinstance(ratio, (int, float)) else ratio[0]
        settings["time_kernel"] = 3 if args.get("std") else 1
        if what.lower() == "uniformer_light":
            half = [[], [], [1] + [0.5] * (settings["depths"][2] - 1), [0.5] * settings["depths"][3]]
            settings |= dict(keep=args.get("prune_ratio", half)[2:], pace=args.get("trade_off", half)[2:])
        else:
            settings["conv_merging"] = args.get("conv_stem", False)
        model = uniformer(**settings, **common)
    else:
        model = create_model(what, **common)
    taps = {f"stage{number + 1}": f"stages.{number}" for number in range(len(model.stages))}
    return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
