"""ULSAM's module."""

from __future__ import annotations

from saccade import Site
from saccade.papers.ulsam import AUTHORS, SubspaceAttention
from tests.ports.port import Port, channels_first, channels_last, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    mixer = SubspaceAttention(Site(args["nin"]), args["num_splits"])
    return Port(mixer, key_map(AUTHORS), channels_last, channels_first)
