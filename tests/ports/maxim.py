"""MAXIM's networks and operators."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade import Site
from saccade.core.keymap import within
from saccade.golden import make_inputs
from saccade.papers.maxim import CROSS, GMLP, TAPS, CrossGating, MultiAxisGmlp, authors, maxim
from tests.ports.port import Port, channels_last, key_map, unused


class Residual(nn.Module):
    """The authors' layer holds the sum that a mixer leaves to its block."""

    def __init__(self, site: Site, mixer: nn.Module) -> None:
        super().__init__()
        self.site, self.mixer = site, mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)


class AllStages(nn.Module):
    """Every supervised picture."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        return self.model.stages(image)


def channels_first_each(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"out{number}": result.movedim(-1, 1) for number, result in enumerate(results)}


def build(golden: dict[str, Any]) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    inputs = make_inputs(golden)
    if what == "ResidualSplitHeadMultiAxisGmlpLayer":
        site = Site(args["num_channels"], grid=tuple(next(iter(inputs.values())).shape[1:-1]))
        mixer = MultiAxisGmlp(site, args["block_size"], args["grid_size"])
        return Port(Residual(site, mixer), key_map(within(GMLP, "", "mixer.")))
    if what.startswith("MAXIM"):
        return network(golden, int(re.search(r"(\d)s$", what)[1]))
    block = CrossGating(args["x_features"], args["cin_y"], args["num_channels"], args["block_size"],
                        args["grid_size"], args.get("upsample_y", True))
    return Port(block, key_map(CROSS), channels_last, channels_first_each)


def network(golden: dict[str, Any], stages: int) -> Port:
    args = golden["source"]["args"]
    rules = authors(args["depth"], stages)
    model = maxim(args["features"], stages, args["depth"])

    def outputs(result: list[list[Tensor]]) -> dict[str, Tensor]:
        return {f"s{i}_{j}": picture for i, pictures in enumerate(result) for j, picture in enumerate(pictures)}

    taps = {name: "model." + next(re.sub(rule, place, name) for rule, place in TAPS.items() if re.fullmatch(rule, name))
            for name in golden["outputs"] if not re.fullmatch(r"s\d_\d", name)}
    return Port(AllStages(model), key_map(within(rules, "", "model.")), outputs=outputs, taps=taps,
                unused=unused(golden, rules))
