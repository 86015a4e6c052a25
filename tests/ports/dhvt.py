"""DHVT's networks, attention with head tokens, and its MLP."""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.dhvt import AGGREGATION, AUTHORS, MIXER, DynamicAggregation, HeadInteraction, dhvt
from saccade.parts.tokens import join
from saccade.tools.verify import taps
from tests.ports.port import Port, State, key_map


def apart(inputs: State) -> tuple[Tensor, Tensor]:
    """The authors' (B, 1 + N, C) as a square grid and the class token."""
    tokens = next(iter(inputs.values()))
    side = isqrt(tokens.shape[1] - 1)
    return tokens[:, 1:].unflatten(1, (side, side)), tokens[:, :1]


def together(result: tuple[Tensor, Tensor]) -> State:
    return {"out": join(*result)}


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    if what == "HI_Attention":
        site = Site(args["dim"], args.get("num_heads", 8))
        return Port(HeadInteraction(site, args.get("qkv_bias", False)), key_map(MIXER), apart, together)
    if what == "DAFF":
        mlp = DynamicAggregation(2, args["in_features"], args.get("hidden_features", args["in_features"]),
                                 args.get("kernel_size", 3))
        return Port(mlp, key_map(AGGREGATION), apart, together)
    model = dhvt(args["embed_dim"], args["num_heads"], args["patch_size"], args["depth"], args["mlp_ratio"],
                 img_size=tuple(x.shape[2:]), num_classes=args["num_classes"])
    return Port(model, key_map(AUTHORS), taps=taps("dhvt_nano", golden))
