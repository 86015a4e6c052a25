"""Maps from slopes: gradient, gradient x input, integrated gradients, SmoothGrad, relevance, Grad-CAM.

Each takes (model, image (B, C, H, W), target (B,)) and returns (B, H, W). The model is in evaluation mode already.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.attribution.classifier import last_map, resize
from saccade.core.errors import SaccadeError
from saccade.parts.relevance import relevance
from saccade.parts.scores import slopes


def gradient(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """sum over c of |d score / d x_c|. Simonyan, Vedaldi, Zisserman, Deep Inside Convolutional Networks, 2014."""
    return slopes(model, image, target).abs().sum(1)


def gradient_x_input(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """sum over c of x_c d score / d x_c. Shrikumar et al., Not Just a Black Box, 2016."""
    return (image * slopes(model, image, target)).sum(1)


def integrated_gradients(
    model: nn.Module, image: Tensor, target: Tensor, steps: int = 32, baseline: float = 0.0
) -> Tensor:
    """sum over c of (x_c - b) mean over t of d score / d x_c at b + t (x - b), at the midpoints t of `steps` parts.

    Its sum tends to score(x) - score(b). Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks, 2017.
    """
    _at_least_one("steps", steps)
    difference = image - baseline
    total = torch.zeros_like(image)
    for step in range(steps):
        total += slopes(model, baseline + (step + 0.5) / steps * difference, target)
    return (difference * total / steps).sum(1)


def lrp(model: nn.Module, image: Tensor, target: Tensor, rule: str = "epsilon") -> Tensor:
    """Layer-wise relevance propagation by a rule of `parts.relevance`, summed over the colours. Bach et al., 2015."""
    return relevance(model, image, target, rule).sum(1)


def smoothgrad(
    model: nn.Module, image: Tensor, target: Tensor, samples: int = 16, noise: float = 0.1, seed: int = 0
) -> Tensor:
    """mean over samples of sum over c of |d score / d x_c| at x + e, e normal, deviation noise x (max - min of x).

    Each picture gets the same draws. Smilkov et al., SmoothGrad: removing noise by adding noise, 2017.
    """
    _at_least_one("samples", samples)
    generator = torch.Generator().manual_seed(seed)
    deviation = noise * (image.amax((1, 2, 3), keepdim=True) - image.amin((1, 2, 3), keepdim=True))
    total = torch.zeros_like(image)
    for _ in range(samples):
        draw = torch.randn(image.shape[1:], generator=generator).to(image)
        total += slopes(model, image + deviation * draw, target).abs()
    return total.sum(1) / samples


def gradcam(model: nn.Module, image: Tensor, target: Tensor, layer: str | None = None) -> Tensor:
    """relu(sum over c of (mean over places of d score / d a_c) a_c), resized; a: the last map, or that of `layer`.

    Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017.
    """
    activations, gradients = last_map(model, image, target, layer)
    maps = (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    return resize(maps, (image.shape[2], image.shape[3]))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise SaccadeError(f"{name} is {value}: give 1 or more")
