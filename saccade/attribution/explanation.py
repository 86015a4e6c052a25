"""One call that explains any image classifier by any method.

    explanation = explain(model, image, "gradcam")
    explanation.maps        # (B, H, W), at the picture's resolution
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attribution import attention, gradients, perturbation
from saccade.attribution.classifier import evaluating
from saccade.core.errors import SaccadeError
from saccade.core.index import index
from saccade.core.index import method as declared
from saccade.core.names import closest
from saccade.parts.scores import scores


@dataclass(frozen=True)
class Explanation:
    """What a method says: maps (B, H, W), whether they speak against the class too, the classes explained (B,)."""

    maps: Tensor
    signed: bool
    target: Tensor
    method: str
    seconds: float


@dataclass(frozen=True)
class Method:
    """function(model, image (B, C, H, W), target (B,), **options) -> (B, H, W); what it needs of a model.

    `needs`: "scores" (any classifier, a black box too), "gradient", "map" (a layer with places, and its gradient), or
    "attention" (softmax weights between tokens, or a class token).
    """

    function: Callable[..., Tensor]
    needs: str
    signed: bool = False


METHODS: dict[str, Method] = {
    "gradient": Method(gradients.gradient, "gradient"),
    "gradient_x_input": Method(gradients.gradient_x_input, "gradient", signed=True),
    "integrated_gradients": Method(gradients.integrated_gradients, "gradient", signed=True),
    "smoothgrad": Method(gradients.smoothgrad, "gradient"),
    "lrp": Method(gradients.lrp, "gradient", signed=True),
    "gradcam": Method(gradients.gradcam, "map"),
    "occlusion": Method(perturbation.occlusion, "scores", signed=True),
    "rise": Method(perturbation.rise, "scores"),
    "lime": Method(perturbation.lime, "scores", signed=True),
    "meaningful_perturbation": Method(perturbation.meaningful_perturbation, "gradient"),
    "raw_attention": Method(attention.raw_attention, "attention"),
    "attention_rollout": Method(attention.attention_rollout, "attention"),
    "gradient_rollout": Method(attention.gradient_rollout, "attention"),
    "attention_relevance": Method(attention.attention_relevance, "attention"),
    "class_token_similarity": Method(attention.class_token_similarity, "attention", signed=True),
}


def list_explainers() -> list[str]:
    """Names of the methods that `explain` knows, sorted: those above and what papers' cards declare."""
    return sorted([*METHODS, *_declared()])


def explain(
    model: nn.Module, image: Tensor, method: str, target: int | Tensor | None = None, **options: Any
) -> Explanation:
    """Which pixels of `image` (B, C, H, W) or (C, H, W), normalised, make the score of class `target`.

    `target` is one class, or one a picture (B,); None takes the class with the highest score. `options` go to the
    method. The model is read in evaluation mode and left as found: training flags, gradients, random state.

    Raises SaccadeError for an unknown method, an option that it has not, a picture or class that does not fit, a model
    that is no classifier or lacks what the method needs.
    """
    function, signed = _find(method)
    if image.ndim not in (3, 4):
        raise SaccadeError(f"image has the shape {tuple(image.shape)}: give (B, C, H, W) or (C, H, W)")
    batch = image if image.ndim == 4 else image[None]
    start = time.perf_counter()
    with evaluating(model):
        batch = batch.detach().clone()  # also out of inference mode
        wanted = _target(model, batch, target)
        try:
            maps = function(model, batch, wanted, **options)
        except TypeError as error:
            if "unexpected keyword argument" in str(error) and f"{function.__name__}()" in str(error):
                raise SaccadeError(f"{method}: {str(error).split('() ', 1)[-1]}") from error
            raise
    return Explanation(maps.detach(), signed, wanted, method, time.perf_counter() - start)


def _find(name: str) -> tuple[Callable[..., Tensor], bool]:
    if name in METHODS:
        return METHODS[name].function, METHODS[name].signed
    if name in _declared():
        function = declared(name, "attribution")
        return function, getattr(function, "signed", False)
    raise SaccadeError(f"there is no attribution method {name!r}"
                       f"{closest(name, list_explainers())}; there are {', '.join(list_explainers())}")


def _declared() -> list[str]:
    known = index()
    return [name for name, paper in known["methods"].items() if "attribution" in known["papers"][paper]["kinds"]]


def _target(model: nn.Module, image: Tensor, target: int | Tensor | None) -> Tensor:
    with torch.no_grad():
        found = scores(model, image)
    if target is None:
        return found.argmax(1)
    wanted = torch.as_tensor(target, device=image.device, dtype=torch.long)
    if wanted.ndim > 1 or (wanted.ndim == 1 and len(wanted) != len(image)):
        raise SaccadeError(f"target has the shape {tuple(wanted.shape)}: give one class, "
                           f"or one a picture ({len(image)})")
    if bool((wanted < 0).any()) or bool((wanted >= found.shape[1]).any()):
        raise SaccadeError(f"target is {wanted.tolist()}: the model has the classes 0 to {found.shape[1] - 1}")
    return wanted.expand(len(image))
