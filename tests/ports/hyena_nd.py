"""Hyena N-D's operator and its DeiT."""

from __future__ import annotations

from typing import Any

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.hyena_nd import AUTHORS, LEARNED, MIXER, HyenaNd, hyena_nd
from tests.ports.port import Port, key_map

SHAPES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def options(args: dict[str, Any]) -> dict[str, Any]:
    """Settings of the filters by their names in the authors' code and in their command line."""
    given = {ours: args[theirs] for theirs, ours in (("window_mode", "window"), ("sqrt_decay", "root"),
             ("hyena2d_sqrt_decay", "root"), ("num_inner_mlps", "depth")) if theirs in args}
    if "emb_dim" in args:
        given["bands"] = (args["emb_dim"] - 1) // 2
    return {} if args.get("direct_paramtrization") else given | {"joint": args.get("hyena2d_filter", False)}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    common = dict(order=args.get("order", args.get("hyena_order", 2)),
                  width=args.get("filter_order", args.get("hyena_filter_order", 64)),
                  direction=args.get("directional_mode", "standard"), direct=args.get("direct_paramtrization", False))
    names = MIXER if args.get("window_mode") != "learn" else (*LEARNED, *MIXER)
    if what == "HyenaOperator2d":
        site = Site(args["d_model"], grid=(args["l_max"],) * 2)
        return Port(HyenaNd(site, **common, **options(args)), key_map(names))
    dim, heads = SHAPES[what.split("_")[1]]
    hyena = 7 if args.get("method", "hyena2d") == "hyena2dattn" else None
    model = hyena_nd(dim, heads, patch=args.get("patch_size", 16), hyena=hyena, img_size=tuple(x.shape[2:]),
                     in_chans=x.shape[1], num_classes=args.get("num_classes", 1000), filters=options(args), **common)
    return Port(model, key_map(AUTHORS), taps={tap: f"blocks.{tap[5:]}" for tap in golden["outputs"] if tap != "out"})
