"""Vision Mamba's bidirectional mixer."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.vim import MIXER, BidirectionalMamba
from tests.ports.mamba import settings
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    length = next(iter(make_inputs(golden).values())).shape[1]
    mixer = BidirectionalMamba(Site(args["d_model"], grid=(length,)), mean=args.get("if_divide_out", False),
                               **settings(args))
    return Port(mixer, key_map(MIXER))
