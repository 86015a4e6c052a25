"""CrossFormer's modules: the whole network, a block, its attention, the cross-scale embedding."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade import Site
from saccade.papers.crossformer import (
    AUTHORS,
    BLOCK,
    MIXER,
    CooledBlock,
    CrossScaleEmbedding,
    LongShortDistance,
    crossformer,
)
from saccade.parts.block import Block
from saccade.parts.mlp import Mlp
from tests.ports.port import Port, as_grid, as_tokens, key_map, only_input


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "CrossFormer":
            depths = args["depths"]
            model = crossformer(
                args["embed_dim"], depths, args["num_heads"][0], args["group_size"],
                args.get("crs_interval", [8, 4, 2, 1]), args.get("patch_size", [4]),
                args.get("merge_size", [[2], [2], [2]]), args["mlp_ratio"], args.get("qkv_bias", True),
                args.get("use_acl", False), img_size=args.get("img_size", 224), in_chans=args.get("in_chans", 3),
                num_classes=args.get("num_classes", 1000))
            taps = {f"stage{number}": f"stages.{number}.downsample" for number in range(1, len(depths))}
            taps[f"stage{len(depths)}"] = f"stages.{len(depths) - 1}"
            return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
        case "CrossFormerBlock":
            site = Site(args["dim"], args["num_heads"], grid=tuple(args["input_resolution"]))
            mixer = LongShortDistance(site, args.get("group_size", 7), args.get("interval", 8),
                                      bool(args.get("lsda_flag", 0)), args.get("qkv_bias", True))
            kind = CooledBlock if args.get("use_extra_conv", True) else Block
            block = kind(site, mixer, norm=nn.LayerNorm, mlp=partial(Mlp, ratio=args.get("mlp_ratio", 4)))
            return Port(block, key_map(BLOCK), as_grid(site.grid), as_tokens)
        case "Attention":
            group = tuple(args["group_size"])
            site = Site(args["dim"], args["num_heads"], grid=tuple(2 * side for side in group))
            mixer = LongShortDistance(site, group, long=False, qkv_bias=args.get("qkv_bias", True))
            return Port(mixer, key_map(MIXER), as_grid(group), as_tokens)
        case "PatchEmbed":
            stem = CrossScaleEmbedding(2, args.get("in_chans", 3), args["embed_dim"], args["patch_size"])
            if args.get("norm_layer") is None:
                stem.norm = nn.Identity()
            return Port(stem, key_map(((r"projs\.(.*)", r"scales.\1"),)), only_input, as_tokens)
    raise NotImplementedError(golden["source"]["object"])
