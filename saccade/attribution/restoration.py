"""What a network that restores pictures looks at: local attribution maps, their diffusion index, intensity by depth.

Gu, Dong, "Interpreting Super-Resolution Networks with Local Attribution Maps", 2021; Hsu, Lee, Chou, "DRCT: Saving
Image Super-resolution away from Information Bottleneck", 2024.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attribution.classifier import evaluating
from saccade.core.errors import SaccadeError
from saccade.core.names import match_modules
from saccade.ops.blur import gaussian_blur

RADIUS = 4  # of the blur, pixels


class Patch(NamedTuple):
    """A square of the restored picture, in its pixels."""

    top: int
    left: int
    side: int


class Intensity(NamedTuple):
    """How strong a layer's output x is: mean and largest of |x|, and the deviation of x."""

    layer: str
    mean: float
    largest: float
    deviation: float


def local_attribution(
    model: nn.Module, image: Tensor, patch: Patch, steps: int = 50, sigma: float = 1.2
) -> Tensor:
    """What each input pixel adds to the detail of a patch: (B, C, H, W) -> (B, C, H, W), with signs.

        sum over t of (d D / d x at x_{t + 1/2}) (x_{t+1} - x_t),   x_t = image blurred by sigma (1 - t / steps)

    D the sum over the patch of the length of the restored picture's gradient: edges and textures count. The path leads
    from the blurred to the sharp picture, so the sum over all pixels tends to D(image) - D(blurred).
    `attribution.abs().sum(1)` is the map that is shown. Raises SaccadeError for a patch that does not lie in the
    result, or of fewer than 2 pixels a side.
    """
    if steps < 1 or not sigma > 0:
        raise SaccadeError(f"steps={steps}, sigma={sigma}: give 1 step or more and a sigma above 0")
    with evaluating(model):
        total = torch.zeros_like(image)
        for step in range(steps):
            before, middle, after = (blurred(image, sigma * (1 - (step + part) / steps)) for part in (0, 0.5, 1))
            leaf = middle.detach().requires_grad_()
            (slope,) = torch.autograd.grad(detail(model(leaf), patch).sum(), leaf)
            total += slope * (after - before)
    return total


def detail(restored: Tensor, patch: Patch) -> Tensor:
    """(B, C, H, W) -> (B,): the sum over the patch and all channels of sqrt(dx^2 + dy^2), differences of neighbours."""
    height, width = restored.shape[-2:]
    top, left, side = patch
    if side < 2 or min(top, left) < 0 or top + side > height or left + side > width:
        raise SaccadeError(f"{patch} does not lie in the restored picture of {width}x{height} pixels, or has fewer "
                           "than 2 a side")
    inside = restored[..., top:top + side, left:left + side]
    down, right = inside[..., 1:, :-1] - inside[..., :-1, :-1], inside[..., :-1, 1:] - inside[..., :-1, :-1]
    return (down.square() + right.square() + 1e-12).sqrt().sum((1, 2, 3))  # a slope at 0 has no direction


def blurred(image: Tensor, sigma: float) -> Tensor:
    """(B, C, H, W) under a Gaussian of 9 x 9 pixels, the borders repeated; a sigma of 0 leaves it."""
    if sigma < 1e-3:
        return image
    return gaussian_blur(F.pad(image, (RADIUS,) * 4, mode="replicate"), sigma, RADIUS)


def diffusion_index(attribution: Tensor) -> Tensor:
    """How many pixels take part, 0 to 100: (B, C, H, W) or (B, H, W) -> (B,).

        (1 - G) 100,   G = sum over i, j of |g_i - g_j| / (2 n^2 mean g),   g the absolute values, channels summed

    G is the coefficient of Gini: near 1 where one pixel has all, 0 where all have the same. Raises SaccadeError for
    a map of zeros.
    """
    values = attribution.abs().double()
    values = (values.sum(1) if values.ndim == 4 else values).flatten(1).sort(1).values
    total, count = values.sum(1), values.shape[1]
    if not (total > 0).all():
        raise SaccadeError("diffusion_index: a map of zeros spreads nowhere; does the patch depend on the picture?")
    # over sorted values the n^2 differences are one weighted sum
    rank = 2 * torch.arange(1, count + 1, dtype=values.dtype, device=values.device) - count - 1
    return 100 * (1 - (rank * values).sum(1) / (count * total))


def feature_intensity(model: nn.Module, image: Tensor, layers: str | None = None) -> list[Intensity]:
    """The curve of feature intensity along depth, in the order of the forward: where it sinks, information is lost.

    `layers` is a pattern of module names; without it they are the groups of a super-resolution network. A layer that
    runs twice stands twice. Raises SaccadeError where there are none.
    """
    curve: list[Intensity] = []
    if layers is not None:
        names = match_modules(model, layers)
    else:
        names = [name for name, _ in model.named_modules() if re.fullmatch(r"groups\.\d+", name)]
    if not names:
        raise SaccadeError(f"{type(model).__name__} has no groups: give layers, a pattern of module names")

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                size = output.detach().abs()
                curve.append(Intensity(name, float(size.mean()), float(size.max()), float(output.detach().std())))
        return see

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return curve
