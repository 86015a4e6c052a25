"""The bicubic resize of the super-resolution field: MATLAB's `imresize`, antialiased, mirrored at the borders.

    y[o] = sum over i of w(u_o - i) x[i] / sum over i of w(u_o - i),   u_o = (o + 1/2) / s - 1/2,
    w(t) = min(s, 1) k(min(s, 1) t),   k the cubic of Keys with a = -1/2,

for both axes, s the scale: a kernel that is 4 pixels wide enlarging, and 4 / s wide shrinking. Beyond the border the
picture is mirrored with its edge repeated (torch's antialiased `interpolate` cuts the kernel off there, and differs).
Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981; MATLAB's documentation of imresize.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.ops.tables import table


def resize(image: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(scale H), ceil(scale W)), in the precision given, not clipped.

    Raises SaccadeError for a scale that is not above 0.
    """
    if not scale > 0:
        raise SaccadeError(f"scale={scale}: give a number above 0, as in 2 or 1 / 3")
    if scale == 1:
        return image
    for axis in (-2, -1):
        place, weight = taps(image.shape[axis], float(scale), image.device)
        weight = weight.to(image.dtype)
        if axis == -2:
            weight = weight[..., None]
        # tap by tap: all at once would hold six to eighteen pictures
        resized = image.index_select(axis, place[0]) * weight[0]
        for tap in range(1, len(place)):
            resized = resized + image.index_select(axis, place[tap]) * weight[tap]
        image = resized
    return image


@table
def taps(length: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places and weights (taps, outputs) from which each output of an axis is made; a weight's column sums to 1."""
    outputs, narrow = ceil(round(length * scale, 6)), min(scale, 1.0)
    width = 4 / narrow
    centre = (torch.arange(outputs, dtype=torch.float64, device=device) + 0.5) / scale - 0.5
    first = (centre - width / 2).floor()
    place = first + torch.arange(ceil(width) + 2, dtype=torch.float64, device=device)[:, None]
    weight = keys((centre - place) * narrow)
    weight = weight / weight.sum(0)
    used = (weight != 0).any(1)
    place = place[used].long() % (2 * length)
    return torch.minimum(place, 2 * length - 1 - place), weight[used]


def keys(t: Tensor) -> Tensor:
    """The cubic kernel with a = -1/2: 1 at 0, 0 at other whole numbers and from 2 on."""
    t = t.abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))
