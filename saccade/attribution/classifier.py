"""Reading any image classifier: in evaluation, and the map that its last layers stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.evaluation import evaluation
from saccade.parts.scores import chosen
from saccade.parts.tokens import token_grid

# Leaves whose outputs are tokens or maps in shape alone: parts of a projection, or attention weights.
NO_MAPS = (nn.Linear, nn.Dropout, nn.Identity, nn.Softmax)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients, every module's training flag as it was afterwards."""
    with evaluation(model), torch.inference_mode(False), torch.enable_grad():
        yield


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) as (B, H, W), bilinear, without aligned corners."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def as_map(value: Any, height: int, width: int) -> Callable[[Tensor], Tensor] | None:
    """How an output (B, C, h, w), (B, h, w, C) or (B, N, C) over a picture is read as (B, C, h, w); None if it is not.

    A side of length h has to fit a picture of `height` at a whole stride. Channels first wins where both would fit.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.ndim == 4:
        if _fits(value.shape[2], value.shape[3], height, width):
            return lambda x: x
        if _fits(value.shape[1], value.shape[2], height, width):
            return lambda x: x.permute(0, 3, 1, 2)
    if value.ndim == 3 and (found := token_grid(value.shape[1], height, width)) is not None:
        prefix, grid = found
        return lambda x: x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    return None


def last_map(model: nn.Module, image: Tensor, target: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Activations and slopes (B, C, h, w) of the last map that the score reads at more than one place.

    Without `layer` all modules are watched and the last one counts in which at least two places have a slope: the last
    stage of a pyramid, the norm before the last attention of a network that classifies its class token.
    Raises SaccadeError where there is no such map, or `layer` is no module or gives none.
    """
    names = dict(model.named_modules())
    if layer is not None and layer not in names:
        raise SaccadeError(f"the model has no module {layer!r}: name one of model.named_modules()")
    watched = [names[layer]] if layer is not None else [m for m in names.values() if not isinstance(m, NO_MAPS)]
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if as_map(output, image.shape[2], image.shape[3]) is not None and output.requires_grad:
            seen.append(output)

    handles = [module.register_forward_hook(keep) for module in watched]
    try:
        score = chosen(model, image.detach().clone().requires_grad_(), target).sum()
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(score, seen, allow_unused=True) if seen and score.requires_grad else ()
    for value, gradient in reversed(list(zip(seen, gradients, strict=True)) if gradients else []):
        read = as_map(value, image.shape[2], image.shape[3])
        if gradient is None or read is None:
            continue
        slope = read(gradient)
        if layer is not None or int((slope.abs().sum((0, 1)) > 0).sum()) > 1:
            return read(value).detach(), slope
    where = f"module {layer!r} gives" if layer is not None else "the model has"
    raise SaccadeError(f"{where} no map (B, C, h, w), (B, h, w, C) or (B, N, C) that the score is computed from")


def _fits(h: int, w: int, height: int, width: int) -> bool:
    if h * w < 2 or h > height or w > width:
        return False
    return any((-(-height // stride), -(-width // stride)) == (h, w) or (height // stride, width // stride) == (h, w)
               for stride in {round(height / h), round(width / w), -(-height // h), height // h} if stride)
