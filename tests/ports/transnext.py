"""TransNeXt's networks and its two attentions."""

from __future__ import annotations

import re

from saccade import Site, create_model
from saccade.golden import make_inputs
from saccade.papers.transnext import AUTHORS, NAMES, TAPS, AggregatedAttention, CosineAttention, transnext
from tests.ports.port import Port, as_grid, as_tokens, key_map


def native_grid(golden: dict) -> tuple[int, ...]:
    """The grid whose sides measure distances stands in the note alone, where it is not the map's own."""
    found = re.search(r"pretrain_size\s*=?\s*\((\d+),\s*(\d+)\)", golden["note"])
    return (int(found[1]), int(found[2])) if found else tuple(golden["source"]["args"]["input_resolution"])


def attention_site(golden: dict) -> Site:
    args = golden["source"]["args"]
    return Site(args["dim"], args.get("num_heads", 8), grid=native_grid(golden))


def aggregation(golden: dict) -> dict:
    """The settings of an aggregated attention."""
    args = golden["source"]["args"]
    return dict(ratio=args.get("sr_ratio", 1), window=args.get("window_size", 3), pool=args.get("fixed_pool_size"),
                qkv_bias=args.get("qkv_bias", True))


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what in ("AggregatedAttention", "Attention"):
        site = attention_site(golden)
        mixer = (AggregatedAttention(site, **aggregation(golden)) if what == "AggregatedAttention"
                 else CosineAttention(site, args.get("qkv_bias", True)))
        return Port(mixer, key_map(NAMES), as_grid(args["input_resolution"]), as_tokens)
    image = next(iter(make_inputs(golden).values()))
    common = dict(img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000), in_chans=image.shape[1])
    if what == "TransNeXt":
        model = transnext(args["embed_dims"], args["depths"], args["sr_ratios"], args["mlp_ratios"],
                          args["embed_dims"][0] // args["num_heads"][0], pool=args.get("fixed_pool_size"),
                          patch=args["patch_size"], qkv_bias=args.get("qkv_bias", False), **common)
    else:
        model = create_model(what, **common)
    return Port(model, key_map(AUTHORS), taps={tap: TAPS[tap] for tap in golden["outputs"] if tap in TAPS})
