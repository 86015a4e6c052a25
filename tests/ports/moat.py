"""MOAT's networks, block and attention."""

from __future__ import annotations

import re

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.moat import ATTENTION, AUTHORS, BLOCK, TAPS, MoatAttention, MoatBlock
from tests.ports.port import Port, as_tokens, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    image = next(iter(make_inputs(golden).values()))
    position = args.get("relative_position_embedding_type", "2d_multi_head") is not None
    if what == "Attention":
        grid = tuple(image.shape[1:-1])
        scales = args.get("scale_ratio") or 1.0
        scales = scales if isinstance(scales, list) else [scales] * 2
        size = [round(side / scale) for side, scale in zip(grid, scales)]
        site = Site(args["hidden_size"], args["hidden_size"] // args["head_size"], grid=grid)
        position = args.get("relative_position_embedding_type") is not None
        return Port(MoatAttention(site, size=size, position=position), key_map(ATTENTION), outputs=as_tokens)
    if what in ("MOATBlock", "MBConvBlock"):
        attended = what == "MOATBlock"
        stride, dim = args.get("block_stride", 2 if attended else 1), args["hidden_size"]
        grid = tuple(-(-side // stride) for side in image.shape[1:-1])
        heads = dim // args.get("head_size", 32)
        site = Site(dim, heads, index=0 if stride == 2 else 1, grid=grid)  # the first block of a stage downsamples
        mixer = MoatAttention(site, args.get("window_size"), args.get("position_embedding_size", 7), position)
        squeeze = 0.0 if attended else args.get("se_ratio", 0.25) or 0.0
        block = MoatBlock(site, mixer if attended else None, 0.0, image.shape[-1], squeeze, args.get("pool_size", 2))
        return Port(block, key_map(BLOCK))
    tiny, number, bare = re.fullmatch(r"(tiny_)?moat(\d)_\w+?_\d+(_no_pe)?_\w+", what).groups()
    bare = bare or args.get("remove_position_embedding")
    classes = args.get("build_classification_head_with_class_num", 1000)
    model = create_model(f"{tiny or ''}moat_{number}{'_no_pe' if bare else ''}", img_size=tuple(image.shape[2:]),
                         num_classes=classes or 0, in_chans=image.shape[1], windows=args.get("window_size"),
                         pool=args.get("pool_size", 3))
    taps = {name: TAPS[name] for name in golden["outputs"] if name in TAPS}
    return Port(model, key_map(AUTHORS), taps=taps)
