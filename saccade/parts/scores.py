"""What any image classifier says, and how it changes with the picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError


def scores(model: nn.Module, image: Tensor) -> Tensor:
    """The scores (B, classes) of a classifier: a tensor, a dict's "scores", or a Hugging Face output's `logits`.

    Raises SaccadeError where the model returns anything else.
    """
    result = model(image)
    if isinstance(result, dict) and "scores" in result:
        result = result["scores"]
    result = getattr(result, "logits", result)
    if not isinstance(result, Tensor) or result.ndim != 2:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise SaccadeError(f"the model returned {found}: only a classifier, (batch, classes) scores, can be explained "
                           "(one that restores pictures, by saccade.attribution.restoration)")
    return result


def chosen(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """The score (B,) of each picture's own target (B,)."""
    return scores(model, image).gather(1, target[:, None])[:, 0]


def slopes(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """d score_target / d image, (B, C, H, W). Raises SaccadeError where the scores have no gradient."""
    leaf = image.detach().clone().requires_grad_()
    score = chosen(model, leaf, target).sum()
    gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
    if gradient is None:
        raise SaccadeError("the scores have no gradient with respect to the picture; use occlusion, rise or lime")
    return gradient
