"""A backbone as what dense-prediction heads take: a list of maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.core.errors import SaccadeError

if TYPE_CHECKING:
    from saccade.core.load import LoadReport


class FeatureInfo(list[dict[str, Any]]):
    """One dict a map: `num_chs`, `reduction` (stride in pixels), `module`."""

    def channels(self) -> list[int]:
        return [int(entry["num_chs"]) for entry in self]

    def reduction(self) -> list[int]:
        return [int(entry["reduction"]) for entry in self]

    def module_name(self) -> list[str]:
        return [str(entry["module"]) for entry in self]


class Backbone(nn.Module):
    """What `create_model` gives: a model that knows its name, its maps and what was loaded into it.

    `feature_info` says what `features` returns, `default_out_indices` which of these maps dense heads take,
    `num_features` the channels that enter the head, `removed` the heads that the caller left out. `load_report` is set
    where a checkpoint was loaded.
    """

    name: str
    load_report: LoadReport
    feature_info: FeatureInfo
    default_out_indices: tuple[int, ...]
    num_features: int
    removed: tuple[str, ...] = ()

    def features(self, image: Tensor) -> list[Tensor]:
        """(B, C, *size) -> maps (B, C_i, *grid_i)."""
        raise NotImplementedError(f"{type(self).__name__} gives no maps")


class FeaturesOnly(Backbone):
    """image (B, C, *grid) -> the maps (B, C_i, *grid_i) that `out_indices` picks of `model.features(image)`."""

    def __init__(self, model: Backbone, out_indices: Sequence[int] | None = None) -> None:
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
        self.default_out_indices = tuple(range(len(self.out_indices)))
        self.num_features = model.num_features
        self.name = model.name

    def features(self, image: Tensor) -> list[Tensor]:
        maps = self.model.features(image)
        return [maps[index] for index in self.out_indices]

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.features(image)
