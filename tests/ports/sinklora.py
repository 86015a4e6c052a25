"""Shifted sparse attention as SinkLoRA's repository holds it: LongLoRA's, causal, with rotary positions, no sinks."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.sinklora import AUTHORS, SinkFixedAttention
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    x = next(iter(make_inputs(golden).values()))
    site = Site(args["hidden_size"], args["heads"], grid=(x.shape[1],))
    return Port(SinkFixedAttention(site, round(1 / args.get("group_size_ratio", 0.25)), sinks=0, causal=True,
                                   cyclic=True, rotary=args.get("rope_theta", 10000.0),
                                   kv_heads=args.get("kv_heads", args["heads"])), key_map(AUTHORS))
