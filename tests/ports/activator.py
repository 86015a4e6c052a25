"""Activator's networks and their gated unit."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.activator import AUTHORS, MIXER, ActivatorGating, activator
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    source, x = golden["source"], next(iter(make_inputs(golden).values()))
    args = source["args"]
    if source["object"] == "ActivatorGatingUnit":
        dim = args["dim"]
        mixer = ActivatorGating(Site(dim, grid=tuple(x.shape[1:-1])), (args["hidden_dim"] + 0.5) / dim)
        return Port(mixer, key_map(MIXER))  # half a channel more: safe from rounding
    dim = args.get("d_model", 256)
    model = activator(
        dim, args.get("num_layers", 4), args.get("patch_size", 4), (args.get("d_ffn", 512) + 0.5) / dim,
        feed_forward="only_geglu" not in source["file"].lower(), img_size=tuple(x.shape[2:]), in_chans=x.shape[1],
        num_classes=args.get("num_classes", 10),
    )
    taps = {f"block{number}": f"blocks.{number}" for number in range(len(model.blocks))}
    return Port(model, key_map(AUTHORS), taps={name: taps[name] for name in golden["outputs"] if name in taps})
