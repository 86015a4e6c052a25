"""A network that restores pictures, on a picture of any size: tile by tile, in the memory of a few tiles.

Neighbouring tiles share `overlap` pixels. The outer quarter of that on either side, where a network feels the tile's
border, is thrown away; over the middle half one tile fades into the other. A network that sees no farther than
overlap / 4 gives, to rounding, what it gives for the whole picture; another shows no seams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.ops.resize import resize

# A picture's part -> what it becomes: (B, C, h, w) -> (B, C, scale h, scale w), numbers in [0, 1].
Restore = Callable[[Tensor], Tensor]


class Network(Protocol):
    """What a model that restores pictures has: how much larger its result is, and the channels it takes.

    `multiple`, where it has one: the side of its windows, to whose multiples it brings a picture.
    """

    scale: int
    in_chans: int

    def __call__(self, image: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Bicubic(nn.Module):
    """The resize that super-resolution is measured against: (B, C, H, W) -> (B, C, scale H, scale W)."""

    def __init__(self, scale: int, in_chans: int = 3) -> None:
        super().__init__()
        self.scale, self.in_chans = scale, in_chans

    def forward(self, image: Tensor) -> Tensor:
        return resize(image, self.scale)


def self_ensemble(restore: Restore) -> Restore:
    """The mean over the eight turned and mirrored pictures, each turned back (Lim et al., EDSR, 2017, section 3.4)."""

    def mean(image: Tensor) -> Tensor:
        total = None
        for turns in range(4):
            for flipped in (False, True):
                turned = torch.rot90(image.flip(-1) if flipped else image, turns, (-2, -1))
                made = torch.rot90(restore(turned), -turns, (-2, -1))
                made = made.flip(-1) if flipped else made
                total = made if total is None else total + made
        assert total is not None
        return total / 8

    return mean


def check_tiles(tile: int, overlap: int, multiple: int) -> int:
    """Pixels from one tile to the next; raises SaccadeError for tiles that do not advance."""
    step = (tile - overlap) // multiple * multiple
    if overlap < 0 or step < 1 or 2 * overlap > tile:
        least = max(2 * overlap, overlap + multiple)
        raise SaccadeError(f"tile={tile} with overlap={overlap}: a tile needs at least twice its overlap and "
                           f"{multiple} pixels more than it, as in a tile of {least}")
    return step


def restored_rows(
    restore: Restore,
    pixels: NDArray[Any],
    *,
    scale: int,
    tile: int,
    overlap: int,
    multiple: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The restored picture from top to bottom, as (first row, rows (C, h, scale W)), not clipped.

    `pixels` (H, W, C) are uint8 or uint16 and become numbers in [0, 1], or floats taken as they are. Tiles begin at
    multiples of `multiple`, so that a network's windows lie as in the whole picture. `progress` hears (tiles done,
    of). Raises SaccadeError for tiles that do not advance.
    """
    step = check_tiles(tile, overlap, multiple)
    height, width, channels = pixels.shape
    rows, columns = starts(height, tile, step), starts(width, tile, step)
    top = np.iinfo(pixels.dtype).max if np.issubdtype(pixels.dtype, np.integer) else 1
    above: Tensor | None = None  # of the tiles above, what lies in the overlap with the present ones
    for number, y in enumerate(rows):
        band = torch.zeros(channels, min(tile, height - y) * scale, width * scale, dtype=dtype)
        for place, x in enumerate(columns):
            part = torch.tensor(pixels[y:y + tile, x:x + tile]).to(device=device, dtype=dtype)
            with torch.no_grad():
                made = restore((part / top).movedim(-1, 0)[None])[0].to("cpu", dtype)
            shared = columns[place - 1] + tile - x if place else 0
            target = band[:, :, x * scale:(x + tile) * scale]
            lay(target, made, fade(shared * scale, dtype))
            if progress is not None:
                progress(number * len(columns) + place + 1, len(rows) * len(columns))
        if above is not None:
            fresh, band[:, :above.shape[1]] = band[:, :above.shape[1]].clone(), above
            lay(band[:, :above.shape[1]].transpose(1, 2), fresh.transpose(1, 2), fade(above.shape[1], dtype))
        last = y == rows[-1]
        done = band.shape[1] if last else (rows[number + 1] - y) * scale
        yield y * scale, band[:, :done]
        above = None if last else band[:, done:].clone()


def lay(target: Tensor, made: Tensor, share: Tensor) -> None:
    """Lay (C, h, w) over what stands there; the first columns by their `share`, the others wholly."""
    width = len(share)
    target[..., :width].lerp_(made[..., :width], share)
    target[..., width:] = made[..., width:]


def fade(length: int, dtype: torch.dtype) -> Tensor:
    """The share of the later of two tiles along their overlap: 0 for a quarter, rising, 1 for a quarter."""
    place = (torch.arange(length, dtype=dtype) + 0.5) / max(length, 1)
    return (2 * place - 0.5).clamp(0, 1)


def starts(side: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along a side, so that the last reaches its end."""
    return list(range(0, max(side - tile, 0) + step, step)) if side > tile else [0]
