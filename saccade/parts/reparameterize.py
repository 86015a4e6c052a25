"""From the form that trains to the form that is deployed: fewer modules, equal outputs."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.parts.norm import BatchNorm

Model = TypeVar("Model", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def reparameterize(model: Model) -> Model:
    """A copy of a model in its deployed form, for evaluation: outputs are equal up to rounding.

    A module that has a `deployed()` gives way to what that returns; in each `nn.Sequential` a batch norm is folded into
    the convolution or linear layer before it. Raises SaccadeError for a model in training mode: batch statistics do not
    fold.
    """
    if model.training:
        raise SaccadeError(f"{type(model).__name__} is in training mode, where batch norms do not fold; call eval()")
    return cast(Model, _deployed(copy.deepcopy(model)))


def _deployed(module: nn.Module) -> nn.Module:
    deployed = getattr(module, "deployed", None)
    if callable(deployed):
        module = deployed()
    for name, child in module.named_children():
        setattr(module, name, _deployed(child))
    if isinstance(module, nn.Sequential):
        for number in range(len(module) - 1):
            layer, norm = module[number], module[number + 1]
            if isinstance(norm, _NORMS) and isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
                fold(layer, norm)
                module[number + 1] = nn.Identity()
    return module


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> None:
    """Give a convolution or linear layer the weight and bias that make the batch norm after it superfluous.

    W' = W gamma / sigma,   b' = (b - mu) gamma / sigma + beta.
    """
    scale, shift = affine_of(norm)
    weight = cast(Tensor, layer.weight)
    layer.weight = nn.Parameter(weight * scale.view(-1, *[1] * (weight.ndim - 1)), weight.requires_grad)
    bias = layer.bias
    moved = shift if bias is None else cast(Tensor, bias) * scale + shift
    layer.bias = nn.Parameter(moved, weight.requires_grad)


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as x scale + shift, an entry a channel."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = cast(Tensor, norm.weight) * (variance + cast(float, norm.eps)).rsqrt()
    return scale, cast(Tensor, norm.bias) - mean * scale
