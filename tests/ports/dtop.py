"""DToP's segmenter with every stage's features and the masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.keymap import within
from saccade.papers.dtop import DToP, authors, dtop
from tests.ports.port import Port, key_map


class AllStages(nn.Module):
    """The scores at picture size, the masks, the features that each head saw."""

    def __init__(self, model: DToP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        (*others, last), _ = self.model.run(image)
        grid = self.model.trunk.grid
        maps = {f"feat{number}": stage for number, stage in enumerate(others)} | {"feat_last": last}
        scores = F.interpolate(last.scores.unflatten(-1, grid), size=image.shape[2:], mode="bilinear")
        return {"pred": scores, "masks": last.masks} | {
            name: stage.features.mT.unflatten(-1, grid) for name, stage in maps.items()}


def build(golden: dict) -> Port:
    trunk, heads = golden["source"]["args"]["backbone"], golden["source"]["args"]["heads"]
    model = dtop(trunk["embed_dims"], trunk["num_layers"], trunk["num_heads"], trunk["out_indices"],
                 [head["thresh"] for head in heads], heads[0]["num_classes"], trunk["img_size"], heads[0]["channels"],
                 heads[0]["layers_per_decoder"], trunk["patch_size"], trunk["in_channels"],
                 heads[0].get("num_heads", 6))
    rename = key_map(within(authors(len(heads)), "", "model."))
    return Port(AllStages(model.eval()), rename, outputs=lambda result: result)
