"""Mamba's mixer."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.mamba import AUTHORS, Mamba
from tests.ports.port import Port, key_map


def settings(args: dict) -> dict:
    """The settings that all mixers of this family have, from the authors' names for them."""
    names = {"d_state": "states", "d_conv": "kernel", "expand": "expand", "dt_rank": "rank", "bias": "bias"}
    return {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs, "auto") != "auto"}


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    length = next(iter(make_inputs(golden).values())).shape[1]
    return Port(Mamba(Site(args["d_model"], grid=(length,)), **settings(args)), key_map(AUTHORS))
