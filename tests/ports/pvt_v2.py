"""PVT v2's networks and the linear form of its attention."""

from __future__ import annotations

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.pvt_v2 import AUTHORS, POOLED, PooledReduction, pvt_v2
from tests.ports import pvt
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what == "Attention":
        if not args.get("linear", False):
            return pvt.build(golden)
        grid = pvt.grid_of(golden["note"])
        mixer = PooledReduction(Site(args["dim"], args["num_heads"], grid=grid), qkv_bias=args.get("qkv_bias", False))
        return Port(mixer, key_map(POOLED), as_grid(grid), as_tokens)
    image = next(iter(make_inputs(golden).values()))
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "PyramidVisionTransformerV2":
        model = pvt_v2(args["embed_dims"], args["depths"], args["num_heads"], args["mlp_ratios"], args["sr_ratios"],
                       args.get("linear", False), qkv_bias=args.get("qkv_bias", False), **common)
    else:
        model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps=pvt.block_taps(model, golden))
