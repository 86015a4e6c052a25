"""Mamba-2's mixer."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.mamba2 import AUTHORS, Mamba2
from tests.ports.port import Port, key_map

NAMES = {"d_state": "states", "headdim": "width", "d_conv": "kernel", "expand": "expand", "ngroups": "groups"}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    length = next(iter(make_inputs(golden).values())).shape[1]
    settings = {NAMES[name]: value for name, value in args.items() if name in NAMES}
    return Port(Mamba2(Site(args["d_model"], grid=(length,)), **settings), key_map(AUTHORS))
