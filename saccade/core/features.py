"""A backbone as what dense-prediction heads take: a list of maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from saccade.core.errors import SaccadeError


class FeatureInfo(list[dict[str, Any]]):
    """One dict a map: `num_chs`, `reduction` (stride in pixels), `module`."""

    def channels(self) -> list[int]:
        return [int(entry["num_chs"]) for entry in self]

    def reduction(self) -> list[int]:
        return [int(entry["reduction"]) for entry in self]

    def module_name(self) -> list[str]:
        return [str(entry["module"]) for entry in self]


class FeaturesOnly(nn.Module):
    """image (B, C, *grid) -> the maps (B, C_i, *grid_i) that `out_indices` picks of `model.features(image)`."""

    def __init__(self, model: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model = model
        every = model.feature_info
        count = len(every)
        chosen = model.default_out_indices if out_indices is None else out_indices
        for index in chosen:
            if not -count <= index < count:
                raise SaccadeError(f"out_indices has {index}: {model.name} has the maps 0 to {count - 1}")
        self.out_indices = tuple(index % count for index in chosen)
        self.feature_info = FeatureInfo(every[index] for index in self.out_indices)
        self.name = model.name

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.model.features(image)
        return [maps[index] for index in self.out_indices]
