"""Maps from attention: raw weights, rollouts, relevance through attention, likeness to the class token.

Each takes (model, image (B, C, H, W), target (B,)) and returns (B, H, W). The model is in evaluation mode already. A
picture is read from the class token's row of a map A (B, T, T), or from the mean row where there is no class token.
Rollouts multiply the maps of all layers, so all layers must stand on one set of tokens; `raw_attention` reads any one
layer whose weights stand between places. `features_as_colours` shows features, (B, 3, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attribution.classifier import as_map, evaluating, resize
from saccade.core.errors import SaccadeError
from saccade.core.record import Affinity, Part, record
from saccade.parts.scores import chosen
from saccade.parts.tokens import token_grid


def raw_attention(model: nn.Module, image: Tensor, target: Tensor, layer: str | None = None) -> Tensor:
    """The weights of one layer, mean over heads: the last that stands between places, or that of module `layer`."""
    with record(model) as found, torch.no_grad():
        model(image)
    if layer is not None:
        return _laid(_dense(found[layer], layer, len(image)).mean(1), image)
    for name in reversed(found.keys()):
        if _fits(found[name], len(image)):
            return _laid(_dense(found[name], name, len(image)).mean(1), image)
    raise SaccadeError("no weights between tokens were computed: the method is for networks with softmax attention")


def attention_rollout(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """product over layers of (I + mean over heads of A) / 2. Abnar, Zuidema, Quantifying Attention Flow, 2020."""
    total = None
    for weights in _layers(model, image):
        total = _step(weights.mean(1), total)
    assert total is not None
    return _laid(total, image)


def gradient_rollout(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Rollout of relu(mean over heads of A d score / d A), rows of I + A normalised: what speaks for the class.

    Gildenblat, Exploring Explainability for Vision Transformers, 2020.
    """
    total = None
    for weighted in _layers(model, image, target):
        total = _step(weighted.mean(1).relu(), total)
    assert total is not None
    return _laid(total, image)


def attention_relevance(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """R <- R + mean over heads of relu(A d score / d A) R, from R = I, less I at the end.

    The gradient-weighted form of Chefer, Gur, Wolf, Generic Attention-Model Explainability, ICCV 2021, equations 5, 6.
    """
    total = None
    for weighted in _layers(model, image, target):
        seen = weighted.relu().mean(1)
        total = _eye(seen) + seen if total is None else total + seen @ total
    assert total is not None
    return _laid(total - _eye(total), image)


def class_token_similarity(model: nn.Module, image: Tensor, target: Tensor, layer: str | None = None) -> Tensor:
    """Cosine of each grid token with the class token: of the last sequence with one, or of that of module `layer`."""
    height, width = image.shape[2:]
    for value in reversed(_outputs(model, image, layer)):
        place = token_grid(value.shape[1], height, width) if value.ndim == 3 else None
        if place is not None and place[0]:
            likeness = F.cosine_similarity(value[:, place[0]:], value[:, :1], dim=-1)
            return resize(likeness.unflatten(1, place[1]), (height, width))
    raise SaccadeError(f"{'the model' if layer is None else f'module {layer!r}'} gives no sequence (B, 1 + N, C) "
                       "with a class token")


def features_as_colours(model: nn.Module, image: Tensor, layer: str | None = None) -> Tensor:
    """The three main components of a layer's features over all places of a batch, as colours (B, 3, H, W) in [0, 1].

    Of the last map, or that of module `layer`. Signs are such that each component's largest entry is positive. Oquab
    et al., DINOv2: Learning Robust Visual Features without Supervision, 2023, figure 1. Raises SaccadeError where there
    is no map with three channels.
    """
    height, width = image.shape[2:]
    with evaluating(model):
        outputs = _outputs(model, image, layer)
    for value in reversed(outputs):
        read = as_map(value, height, width)
        if read is None or read(value).shape[1] < 3:
            continue
        x = read(value)
        flat = x.movedim(1, -1).flatten(0, 2)
        flat = flat - flat.mean(0)
        axes = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
        parts = flat @ axes.T
        low, high = parts.aminmax(dim=0)
        parts = ((parts - low) / (high - low).clamp(min=1e-12)).view(len(x), *x.shape[2:], -1).movedim(-1, 1)
        return F.interpolate(parts, (height, width), mode="bilinear", align_corners=False)
    raise SaccadeError(f"{'the model' if layer is None else f'module {layer!r}'} gives no map of three channels")


def _layers(model: nn.Module, image: Tensor, target: Tensor | None = None) -> list[Tensor]:
    """Maps (B, heads, T, T) of all layers in order, times the slopes of the score where there is a `target`."""
    with record(model, attached=target is not None) as found:
        if target is None:
            with torch.no_grad():
                model(image)
        else:
            score = chosen(model, image.detach().clone().requires_grad_(), target).sum()
    maps: list[Tensor] = []
    for name in found.keys():
        affinity = found.affinities[name]
        if target is not None:
            slopes = torch.autograd.grad(score, [part.weights for part in affinity.parts], retain_graph=True,
                                         allow_unused=True, materialize_grads=True)
            affinity = Affinity([Part((part.weights * slope).detach(), part.query, part.key)
                                 for part, slope in zip(affinity.parts, slopes, strict=True)])
        maps.append(_dense(affinity, name, len(image)))
        if maps[0].shape[-1] != maps[-1].shape[-1]:
            raise SaccadeError(f"{name} attends among {maps[-1].shape[-1]} tokens, {found.keys()[0]} among "
                               f"{maps[0].shape[-1]}: rollout needs one set of tokens; "
                               "choose raw_attention with layer=")
    if not maps:
        raise SaccadeError("no weights between tokens were computed: the method is for networks with softmax attention")
    return maps


def _fits(affinity: Affinity, batch: int) -> bool:
    """Whether all weights stand between known places of one picture each."""
    return affinity.placed and all(
        part.weights.shape[0] in (batch * len(ids), len(ids))
        for part in affinity.parts for ids in (part.query, part.key) if ids is not None)


def _dense(affinity: Affinity, name: str, batch: int) -> Tensor:
    if not _fits(affinity, batch):
        raise SaccadeError(f"the weights of {name} do not stand between known places; name another with layer=")
    return affinity.dense(batch)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _step(weights: Tensor, total: Tensor | None) -> Tensor:
    """One layer (B, T, T) with its residual path, rows summing to 1, after the layers before it."""
    both = weights + _eye(weights)
    both = both / both.sum(-1, keepdim=True)
    return both if total is None else both @ total


def _laid(weights: Tensor, image: Tensor) -> Tensor:
    """The class token's row of (B, T, T), or the mean row, on the picture."""
    height, width = image.shape[2:]
    place = token_grid(weights.shape[-1], height, width)
    if place is None:
        raise SaccadeError(f"{weights.shape[-1]} tokens do not lie on a grid over {height} x {width} pixels")
    prefix, grid = place
    row = weights[:, 0] if prefix else weights.mean(1)
    return resize(row[:, prefix:].unflatten(1, grid), (height, width))


def _outputs(model: nn.Module, image: Tensor, layer: str | None) -> list[Tensor]:
    """What each module gives in a forward, in order; that of module `layer` alone where one is named."""
    names = dict(model.named_modules())
    if layer is not None and layer not in names:
        raise SaccadeError(f"the model has no module {layer!r}: name one of model.named_modules()")
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(output, Tensor):
            seen.append(output.detach())

    handles = [module.register_forward_hook(keep) for name, module in names.items() if layer in (None, name)]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen
