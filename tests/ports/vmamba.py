"""VMamba's cross-scan and its block."""

from __future__ import annotations

from saccade import Site
from saccade.core.keymap import within
from saccade.golden import make_inputs
from saccade.papers.vmamba import CrossScan
from saccade.parts.ssm import GRID_SCAN, MixerBlock
from tests.ports.mamba import settings
from tests.ports.port import Port, key_map

BLOCK = (
    (r"ln_1\.(.*)", r"norm.\1"),
    *within((*GRID_SCAN, (r"(.*)", r"\1")), r"self_attention\.", "mixer."),
)


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    grid = tuple(next(iter(make_inputs(golden).values())).shape[1:-1])
    site = Site(args["d_model"] if what == "SS2D" else args["hidden_dim"], grid=grid)
    mixer = CrossScan(site, conv_bias=args.get("conv_bias", True), **settings(args | {"d_conv": args.get("d_conv", 3)}))
    if what == "SS2D":
        return Port(mixer, key_map(GRID_SCAN))
    return Port(MixerBlock(site, mixer), key_map(BLOCK))
