"""Methods that train a backbone without labels, by name, and what they have in common."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.index import method_with

KIND = "pretraining"
# What an objective may learn from: pictures (B, C, H, W), {modality: maps} of the same scenes, volumes (B, C, X, Y, Z).
KINDS = ("pictures", "scenes", "volumes")


@runtime_checkable
class Objective(Protocol):
    """A module that holds `model`, a backbone, and trains it in place; what else it has is thrown away afterwards.

    A card of kind "pretraining" declares `methods={"rotnet": "rotnet"}`: a function or class `(model, **options) ->
    Objective`. `objective(images)` takes normalised pictures (B, C, H, W) and gives {"loss": scalar, other named
    scalars...}.

    Optional: the attribute `takes` (some of KINDS; without it pictures alone), the class attribute `views` (where it is
    above 1, images are (B, views, C, H, W), so many independently augmented crops of each picture),
    `after_step(share)`, called after each step of the optimizer with the share of training that is done (a teacher that
    follows the model), and `reconstruct(images) -> (B, C, H, W)`, what a masked method predicts, to look at.
    """

    model: nn.Module

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


def pretraining(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """The objective of a method around a backbone, ours or timm's: `pretraining(model, "rotnet")`.

    Raises SaccadeError for an unknown method or option, and for a model that the method cannot train.
    """
    objective: nn.Module = method_with(name, KIND, options)(model, **options)
    return objective


def feature_width(model: nn.Module, name: str) -> int:
    """Channels D of a model without a head, image (B, C, H, W) -> (B, D); SaccadeError where it is none."""
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)  # the first is timm's
    if getattr(model, "num_classes", None) != 0 or not isinstance(width, int):
        raise SaccadeError(f"{name} trains a backbone without a head, and this {type(model).__name__} is none: build "
                           "one with num_classes=0")
    return width
