"""Maps of a ResNet in the grid settings, and the localization of given maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade import Site, create_model
from saccade.core.keymap import Dropped
from saccade.papers.attribution_evaluation import GridSetting, aggregate, localization
from saccade.parts.resnet import resnet_names
from tests.ports.port import Port, key_map

METHODS = {"GradCam": "gradcam", "GradCamPlusPlus": "gradcam_plus_plus", "LayerCam": "layercam"}
TARGETS = (3, 7)
KEYS = (
    Dropped(r"set\.model\.classifier\..*", "the same tensor as the network's own"),
    *((rf"set\.model\.base_model\.{rule[0]}", rf"model.{rule[1]}", *rule[2:]) for rule in resnet_names()),
)


class Maps(GridSetting):
    """All maps that the golden names, and the scores of the first head."""

    wanted: tuple[str, ...] = ()

    def forward(self, grid: Tensor) -> dict[str, Tensor]:
        found = {"logits": super().forward(grid)}
        layers = {"Middle": len(self.model.stages) // 2, "Final": len(self.model.stages)}
        for name in self.wanted:
            method, layer, head = name.split("_")
            maps = self.attribute(grid, torch.tensor(TARGETS), int(head[1:]), layers[layer], METHODS[method])
            found[name] = maps[:, None]
        return found


class Localization(nn.Module):
    """a (images, targets, 1, h, w): scores of every cell, of the corners, and the binned maps of the first cell."""

    def forward(self, a: Tensor) -> dict[str, Tensor]:
        n, size = 2, (a.shape[3] * 4, a.shape[4] * 4)
        return {
            "grid": torch.stack([localization(a[:, k, 0], k, n, size) for k in range(n * n)]),
            "corners": torch.stack([localization(a[:, 0, 0], 0, n, size), localization(a[:, 1, 0], 3, n, size)]),
            "aggatt": aggregate(a[:, 0, 0], 0, n, size, (0, 0.1, 0.3, 0.7, 0.9, 1)),
        }

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return 0  # sums alone


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if not args:
        return Port(Localization(), key_map(()), outputs=lambda result: result)
    setting = golden["source"]["object"].split("Container")[0].lower()
    module = Maps(create_model(args["model"]), setting, args["scale"])
    module.wanted = tuple(name for name in golden["outputs"] if name != "logits")
    return Port(module, key_map(KEYS), outputs=lambda result: result)
