"""MoH's networks and its two gated attentions."""

from __future__ import annotations

from saccade import create_model
from saccade.golden import make_inputs
from saccade.papers.moh import AUTHORS, GATES, TAPS, AggregatedMixtureOfHead, MixtureOfHead
from tests.ports.port import Port, as_grid, as_tokens, key_map
from tests.ports.transnext import aggregation, attention_site


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    if what in ("AggregatedAttention", "Attention"):
        site, heads = attention_site(golden), (args.get("shared_head", 0), args.get("routed_head", 0))
        mixer = (AggregatedMixtureOfHead(site, *heads, **aggregation(golden)) if what == "AggregatedAttention"
                 else MixtureOfHead(site, *heads, args.get("qkv_bias", True)))
        return Port(mixer, key_map(GATES), as_grid(args["input_resolution"]), as_tokens)
    image = next(iter(make_inputs(golden).values()))
    model = create_model(what, img_size=tuple(image.shape[2:]), num_classes=args.get("num_classes", 1000),
                         in_chans=image.shape[1])
    return Port(model, key_map(AUTHORS), taps={tap: TAPS[tap] for tap in golden["outputs"] if tap in TAPS})
