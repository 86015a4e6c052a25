"""Do robust networks explain themselves better?  Nine methods, three scores, clean and corrupted pictures.

For a picture x of class c with its object in `where`, and a map A of one of NINE methods,
    pointing game   is argmax A inside `where`?                                  (chance: the object's share of x)
    deletion        area under p_c while pixels go, the largest A first          (attribution.trust; lower is better)
    insertion       area under p_c while they come out of a blur                 (higher is better)
A model's p_c(x) bounds both areas, so that they follow its confidence: across models compare them over p_c(x) too.

Nourelahi, Kotthoff, Chen, Nguyen, "How explainable are adversarially-robust CNNs?", 2022.

`saccade trust DATA --models A,B` makes the table. Theirs has twelve networks of ImageNet, a fourth score (boxes from
thresholded maps, not here) and other sets for out-of-distribution pictures; here these are corrupted, as strongly as in
Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.names import closest
from saccade.core.optional import optional
from saccade.ops.blur import gaussian_blur

functional = optional("torchvision.transforms.v2.functional", extra="train")

CARD = Card(
    "How explainable are adversarially-robust CNNs?",
    authors="Nourelahi, Kotthoff, Chen, Nguyen",
    year=2022,
    systems=("explainable_robust",),
    arxiv="2205.13042",
    read="abstract, fact sheet",
    keywords="pointing game, insertion, deletion, out-of-distribution, corruptions, robustness, attribution benchmark",
    kinds=("explain",),
    tests=("tests/papers/test_explainable_robust.py", "tests/tools/test_trust_table.py"),
)

# By slopes, by the last map, by changed pictures: names that `explain` knows.
NINE = ("gradient", "gradient_x_input", "integrated_gradients", "smoothgrad", "gradcam", "occlusion", "rise", "lime",
        "meaningful_perturbation")


def pointing_game(maps: Tensor, where: Tensor) -> Tensor:
    """Whether the largest value of a map, the first of equal ones in reading order, lies in `where`: (B,) bool.

    Both (B, H, W), `where` bool. Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016; no margin.
    Raises SaccadeError for other shapes.
    """
    if maps.shape != where.shape or maps.ndim != 3:
        raise SaccadeError(f"maps {tuple(maps.shape)} and objects {tuple(where.shape)}: give two of (B, H, W)")
    return where.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0].bool()


def _noise(x: Tensor, strength: float, generator: Generator) -> Tensor:
    return x + strength * torch.randn(x.shape, generator=generator)


def _shot(x: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


def _impulse(x: Tensor, share: float, generator: Generator) -> Tensor:
    draw = torch.rand(x.shape, generator=generator)
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, x))


def _blur(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    deviation *= min(x.shape[2:]) / 224  # of pictures of 224 pixels
    radius = min(max(1, round(3 * deviation)), min(x.shape[2:]) - 1)
    return gaussian_blur(F.pad(x, (radius,) * 4, mode="reflect"), deviation, radius)


def _contrast(x: Tensor, kept: float, generator: Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + kept * (x - mean)


def _pixelate(x: Tensor, kept: float, generator: Generator) -> Tensor:
    return F.interpolate(F.interpolate(x, scale_factor=kept, mode="area"), x.shape[2:], mode="nearest")


def _jpeg(x: Tensor, quality: int, generator: Generator) -> Tensor:
    return torch.stack([functional.jpeg(one, quality) for one in (x * 255).round().byte()]).to(x) / 255


# What becomes of pixels (B, C, H, W) in [0, 1], and its setting at the strengths 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot": (_shot, (60, 25, 12, 5, 3)),
    "impulse": (_impulse, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "blur": (_blur, (1, 2, 3, 4, 6)),
    "brightness": (lambda x, added, generator: x + added, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
}


def corrupt(pixels: Tensor, name: str, strength: int = 3, seed: int = 0) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] under one of `CORRUPTIONS`, cut off at 0 and 1; equal seeds give equal noise.

    JPEG takes one or three channels. Raises SaccadeError for an unknown name or strength.
    """
    if name not in CORRUPTIONS:
        raise SaccadeError(f"there is no corruption {name!r}"
                           f"{closest(name, list(CORRUPTIONS)) or '; there are ' + ', '.join(CORRUPTIONS)}")
    function, settings = CORRUPTIONS[name]
    if not 1 <= strength <= len(settings):
        raise SaccadeError(f"strength is {strength}: give 1 to {len(settings)}")
    generator = torch.Generator().manual_seed(seed)
    return function(pixels.cpu(), settings[strength - 1], generator).clamp(0, 1).to(pixels)
