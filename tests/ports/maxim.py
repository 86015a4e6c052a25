"""MAXIM's operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import within
from saccade.papers.maxim import CROSS, GMLP, CrossGating, MultiAxisGmlp
from saccade.tools.golden import make_inputs
from tests.ports.port import Port, channels_last, key_map


class Residual(nn.Module):
    """The authors' layer holds the sum that a mixer leaves to its block."""

    def __init__(self, site: Site, mixer: nn.Module) -> None:
        super().__init__()
        self.site, self.mixer = site, mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)


def channels_first_each(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"out{number}": result.movedim(-1, 1) for number, result in enumerate(results)}


def build(golden: dict[str, Any]) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    inputs = make_inputs(golden)
    if what == "ResidualSplitHeadMultiAxisGmlpLayer":
        site = Site(args["num_channels"], grid=tuple(next(iter(inputs.values())).shape[1:-1]))
        mixer = MultiAxisGmlp(site, args["block_size"], args["grid_size"])
        return Port(Residual(site, mixer), key_map(within(GMLP, "", "mixer.")))
    block = CrossGating(args["x_features"], args["cin_y"], args["num_channels"], args["block_size"],
                        args["grid_size"], args.get("upsample_y", True))
    return Port(block, key_map(CROSS), channels_last, channels_first_each)
