"""What spoils a picture, made on the fly: smaller, noisy, compressed, in rain, in haze.

Each is a callable (clean picture (C, H, W) in [0, 1], generator) -> what a network gets; all random numbers come from
the generator. The result is in whole levels of 8 bits, as in a file, but for noise (as papers on it do).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from saccade.core.errors import SaccadeError
from saccade.ops.resize import resize


class Degradation(Protocol):
    """(C, H, W) in [0, 1] -> (C, H / scale, W / scale)."""

    scale: int

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor: ...


@dataclass(frozen=True)
class Smaller:
    """MATLAB's bicubic resize to 1 / scale, in whole levels: the field's classical super-resolution."""

    scale: int

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        return whole(resize(clean[None].double(), 1 / self.scale)[0]).to(clean)


@dataclass(frozen=True)
class Noise:
    """clean + e, e normal, its deviation in levels of 255 even between `low` and `high`; not clipped, not rounded."""

    low: float
    high: float
    scale: int = 1

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        deviation = even(self.low, self.high, generator) / 255
        return clean + deviation * torch.randn(clean.shape, generator=generator).to(clean)


@dataclass(frozen=True)
class Jpeg:
    """Compressed and decoded again at a quality even between `low` and `high` (of 1 to 100)."""

    low: int
    high: int
    scale: int = 1

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        quality, packed = round(even(self.low, self.high, generator)), io.BytesIO()
        pixels = (clean.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels[..., 0] if len(clean) == 1 else pixels).save(packed, "JPEG", quality=quality)
        with Image.open(packed) as image:
            decoded = torch.from_numpy(np.array(image)).reshape(pixels.shape)
        return decoded.movedim(-1, 0).to(clean) / 255


@dataclass(frozen=True)
class Rain:
    """clean + s: bright streaks of one direction, `amount` drops a pixel, up to `length` pixels long.

    Drops are single pixels, drawn out along a line that leans up to 45 degrees from the vertical. (Streaks added to the
    picture: Yang et al., "Deep Joint Rain Detection and Removal from a Single Image", 2017.)
    """

    amount: float = 0.01
    length: int = 25
    scale: int = 1

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        height, width = clean.shape[1:]
        lean, length = even(-math.pi / 4, math.pi / 4, generator), even(self.length / 3, self.length, generator)
        reach = math.ceil(length / 2)
        drops = torch.rand(height + 2 * reach, width + 2 * reach, generator=generator)
        drops = (drops < even(self.amount / 2, self.amount, generator)).float()
        away = torch.arange(-reach, reach + 1).float()
        beside = (away[None] * math.cos(lean) - away[:, None] * math.sin(lean)).abs()
        along = (away[:, None] * math.cos(lean) + away[None] * math.sin(lean)).abs()
        line = (1 - beside).clamp(min=0) * (along <= length / 2)
        streaks = F.conv2d(drops[None, None], line[None, None])[0, 0].clamp(max=1)
        return whole(clean + even(0.3, 0.8, generator) * streaks.to(clean))


@dataclass(frozen=True)
class Haze:
    """clean t + a (1 - t), t = exp(-b depth): a white light a, thicker with a smooth depth that grows to the top.

    a is even in [0.7, 1], b in [0.6, 1.8], as for RESIDE (Li et al., "Benchmarking Single-Image Dehazing and Beyond",
    2019); there depth was measured, here it is a ramp with random hills.
    """

    scale: int = 1

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        height, width = clean.shape[1:]
        hills = torch.rand(1, 1, 4, 4, generator=generator)
        hills = F.interpolate(hills, size=(height, width), mode="bicubic", align_corners=True)[0, 0]
        depth = (torch.linspace(1, 0, height)[:, None] + 0.5 * hills.clamp(0, 1)) / 1.5
        through = torch.exp(-even(0.6, 1.8, generator) * depth).to(clean)
        return whole(clean * through + even(0.7, 1.0, generator) * (1 - through))


NAMES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (r"x(\d)", "x2, x3, x4: smaller, bicubic", lambda scale: Smaller(int(scale))),
    (r"noise(\d+)(?:-(\d+))?", "noise25, noise0-50: levels", lambda low, high: Noise(float(low), float(high or low))),
    (r"jpeg(\d+)(?:-(\d+))?", "jpeg40, jpeg10-90: quality", lambda low, high: Jpeg(int(low), int(high or low))),
    (r"rain", "rain", lambda: Rain()),
    (r"haze", "haze", lambda: Haze()),
)


def degradation(name: str) -> Degradation:
    """A degradation by its name: x4, noise25, noise0-50, jpeg40, rain, haze; raises SaccadeError for another."""
    for pattern, _, make in NAMES:
        if found := re.fullmatch(pattern, name):
            made: Degradation = make(*found.groups())
            return made
    raise SaccadeError(f"there is no degradation {name!r}; there are {'; '.join(told for _, told, _ in NAMES)}")


def whole(image: Tensor) -> Tensor:
    """The nearest of 256 levels in [0, 1]."""
    return (image.clamp(0, 1) * 255).round() / 255


def even(low: float, high: float, generator: Generator) -> float:
    """A number drawn evenly between two."""
    return low + (high - low) * float(torch.rand((), generator=generator))
