"""Maps of what a classifier looks at, and how they are laid on the picture."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from saccade.attribution.classifier import evaluating
from saccade.core.errors import SaccadeError
from saccade.ops.blur import gaussian_blur

# Eleven knots of a perceptually even scale: lightness rises steadily, so it reads in grey and for the colour-blind too.
SCALE = ("000004", "160b39", "420a68", "6a176e", "932667", "bc3754", "dd513a", "f37819", "fca50a", "f6d746", "fcffa4")


def sensitivity(
    model: nn.Module, image: Tensor, target: int, samples: int = 8, noise: float = 0.1, seed: int = 0
) -> Tensor:
    """How strongly the score of class `target` answers to a small change of each pixel, scaled so that the peak is 1.

    heat[h, w] = mean over samples of sum over c of |d score_target / d x[c, h, w]|, at x = image + e, where
    e is normal with the standard deviation noise * (image.max() - image.min()); then blurred by a Gaussian of one
    hundredth of the longer side. The model runs in evaluation mode and is left as found: training flags, gradients,
    requires_grad and the global random state do not change, and the same call gives the same map.

    Args: image (C, H, W), normalised, on the model's device. Returns (H, W) in [0, 1], all 0 where nothing answers.
    Raises: SaccadeError if the image is no (C, H, W), the scores are no (B, classes), `target` is no class, or the
    scores do not depend on the image in a differentiable way.
    Source: Smilkov, Thorat, Kim, Viégas, Wattenberg, SmoothGrad: removing noise by adding noise, 2017, section 3. The
    absolute value is taken of each copy, before the mean, so slopes of opposite sign do not cancel.
    """
    if image.ndim != 3:
        raise SaccadeError(f"image has the shape {tuple(image.shape)}: give one picture, (channels, height, width)")
    if samples < 1:
        raise SaccadeError(f"samples is {samples}: give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.randn(samples, *image.shape, generator=generator)
    with evaluating(model):
        deviation = noise * (image.max() - image.min())
        copies = (image.detach().clone() + deviation * jitter.to(image)).requires_grad_()
        slopes = _slopes(model(copies), copies, target)
    heat = _blur(slopes.abs().sum(dim=1).mean(dim=0))
    peak = heat.max()
    return heat / peak if peak > 0 else heat


def overlay(picture: Image.Image, heat: Tensor, size: int) -> Image.Image:
    """The picture in grey with the heat (H, W), values in [0, 1], glowing over it; the longer side gets `size` pixels.

    `picture` is what the model saw, already cropped as for the model. A small picture is enlarged without blur, so that
    its pixels can be told apart; the heat is interpolated.
    """
    if heat.ndim != 2:
        raise SaccadeError(f"heat has the shape {tuple(heat.shape)}: give one map, (height, width)")
    ratio = size / max(picture.size)
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    resampling = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS
    grey = picture.convert("L").resize((width, height), resampling)
    base = torch.tensor(np.asarray(grey), dtype=torch.float32)[..., None]
    warm = heat.detach().float().cpu()[None, None]
    warm = F.interpolate(warm, (height, width), mode="bilinear", antialias=True).clamp(0, 1)[0, 0]
    knots = torch.tensor([list(bytes.fromhex(knot)) for knot in SCALE], dtype=torch.float32)
    place = warm * (len(knots) - 1)
    low = place.long().clamp(max=len(knots) - 2)
    glow = torch.lerp(knots[low], knots[low + 1], (place - low)[..., None])
    # The square root lets weak answers be seen: maps have few peaks and long tails.
    cover = 0.3 + 0.6 * warm[..., None].sqrt()
    return Image.fromarray(torch.lerp(base, glow, cover).round().to(torch.uint8).numpy())


def as_data_uri(image: Image.Image) -> str:
    """The picture as a PNG inside a `data:` address, for a page that must not load anything."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _slopes(scores: Tensor, copies: Tensor, target: int) -> Tensor:
    """d scores[:, target] / d copies, (samples, C, H, W)."""
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise SaccadeError(f"the model returned {found}: a sensitivity map needs (batch, classes) scores")
    if not 0 <= target < scores.shape[1]:
        raise SaccadeError(f"target is {target}: the model has the classes 0 to {scores.shape[1] - 1}")
    slopes = None
    if scores.requires_grad:
        slopes = torch.autograd.grad(scores[:, target].sum(), copies, allow_unused=True)[0]
    if slopes is None:
        raise SaccadeError("the scores have no gradient with respect to the picture: this model cannot be mapped")
    return slopes


def _blur(heat: Tensor) -> Tensor:
    """Gaussian blur of (H, W) by one hundredth of the longer side; a map under 17 pixels stays as it is."""
    deviation = max(heat.shape) / 100
    radius = round(3 * deviation)
    if radius == 0:
        return heat
    return gaussian_blur(F.pad(heat[None, None], (radius,) * 4, mode="replicate"), deviation, radius)[0, 0]
