"""One level of the dual-tree complex wavelet transform of a map, and back: six orientations, nothing lost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.sizes import modulo
from saccade.ops.tables import table
from saccade.ops.window import crop

Taps = tuple[float, ...]

# Kingsbury's near-symmetric biorthogonal filters of 13 and 19 taps; a symmetric filter is written up to its middle tap.
# Those of the inverse are the same two, with every second sign turned.
LOW: Taps = tuple(tap / 5120 for tap in (-9, 0, 114, -240, -247, 1520, 2844))
HIGH: Taps = tuple(tap / 1146880 for tap in (-81, 0, 1539, -2160, -8208, 27360, 63816, -59280, -343786, 641600))
INVERSE_LOW: Taps = tuple(-tap if place % 2 == 0 else tap for place, tap in enumerate(HIGH))
INVERSE_HIGH: Taps = tuple(tap if place % 2 == 0 else -tap for place, tap in enumerate(LOW))


def dtcwt(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> low-pass map (B, 2h, 2w, C) and coefficients (B, h, w, 6, 2, C), h = ceil(H / 2), w likewise.

    The first level, whose two trees are the even and the odd samples of one undecimated transform. Maps are mirrored
    over their edges; the last row of an odd side is repeated first. Coefficients are real and imaginary parts at 15,
    45, 75, 105, 135 and 165 degrees.
    (Kingsbury, "Complex Wavelets for Shift Invariant Analysis and Filtering of Signals", 2001.)
    """
    rows = [filtered(x, 2, taps) for taps in (LOW, HIGH)]
    low = filtered(rows[0], 1, LOW)
    angles: list[Tensor] = [low] * 12
    for place, (across, taps) in enumerate(((0, HIGH), (1, HIGH), (1, LOW))):
        # The four samples of a 2x2 quad are two complex numbers, one for each of two mirrored angles.
        quads = filtered(rows[across], 1, taps, 0.5**0.5).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        a, b, c, d = (quads[:, :, row, :, column] for row in (0, 1) for column in (0, 1))
        angles[2 * place : 2 * place + 2] = a - d, b + c
        angles[10 - 2 * place : 12 - 2 * place] = a + d, b - c
    return low, torch.stack(angles, 3).unflatten(3, (6, 2))


def inverse_dtcwt(low: Tensor, high: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Undo `dtcwt` of a map of this grid: (B, 2h, 2w, C), (B, h, w, 6, 2, C) -> (B, H, W, C)."""
    rows = []
    for place, taps in enumerate((INVERSE_HIGH, INVERSE_HIGH, INVERSE_LOW)):
        (p, q), (r, s) = (high[:, :, :, angle].unbind(3) for angle in (place, 5 - place))
        quads = torch.stack([torch.stack([p + r, q + s], 3), torch.stack([q - s, r - p], 3)], 2)
        rows.append(filtered(quads.flatten(3, 4).flatten(1, 2), 1, taps, 0.5**0.5))
    first = filtered(low, 1, INVERSE_LOW) + rows[0]
    return crop(filtered(first, 2, INVERSE_LOW) + filtered(rows[1] + rows[2], 2, INVERSE_HIGH), grid)


def filtered(x: Tensor, axis: int, taps: Taps, gain: float = 1.0) -> Tensor:
    """A symmetric filter times `gain` along axis 1 or 2 of (B, H, W, C), mirrored; an odd side gets one longer."""
    C = x.shape[-1]
    x = x.index_select(axis, mirror(x.shape[axis], len(taps) - 1, x.device))
    return F.conv2d(x.movedim(-1, 1), kernel(taps, gain, axis, C, x.dtype, x.device), groups=C).movedim(1, -1)


@table
def kernel(taps: Taps, gain: float, axis: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(dim, 1, 2n - 1, 1), or, along axis 2, (dim, 1, 1, 2n - 1): the n taps and their mirror image, times `gain`."""
    whole = torch.tensor([gain * tap for tap in (*taps, *reversed(taps[:-1]))], dtype=dtype, device=device)
    return whole.view((-1, 1) if axis == 1 else (1, -1)).repeat(dim, 1, 1, 1)


@table
def mirror(side: int, reach: int, device: torch.device) -> Tensor:
    """Places of an axis, made even by repeating its last one, with `reach` mirrored ones before and after."""
    even = (side + 1) // 2 * 2
    period = 2 * even
    place = torch.arange(-reach, even + reach, device=device) + reach * period
    place = modulo(place, period)
    return torch.minimum(place, period - 1 - place).clamp(max=side - 1)
