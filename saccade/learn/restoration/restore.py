"""A picture restored by a network: gray, colour, alpha and 16 bits, whatever channels the network takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.learn.restoration.pictures import Picture
from saccade.learn.restoration.tiling import Bicubic, Network, Restore, check_tiles, restored_rows, self_ensemble

Progress = Callable[[int, int], None]  # tiles done, of


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut for the network, in pixels of the input; `ensemble`: the mean over its eight turns."""

    tile: int = 256
    overlap: int = 32
    ensemble: bool = False


def restore_picture(
    model: Network, picture: Picture, tiles: Tiles | None = None, progress: Progress | None = None
) -> Picture:
    """The picture, `model.scale` times as large, in its own depth, with its alpha, EXIF and profile.

    A gray picture is shown to a network of colours in three equal channels, whose mean is kept; a network of one
    channel sees each colour by itself. Alpha is enlarged by the bicubic resize; what it hides takes no part: there the
    network sees the colours around. Raises SaccadeError for tiles that do not advance, or a result that is not finite.
    """
    tiles = tiles or Tiles()
    check_tiles(tiles.tile, tiles.overlap, getattr(model, "multiple", 1))
    pixels, alpha = picture.pixels, picture.alpha
    if alpha is not None:
        pixels = spread(pixels, alpha)
    network = adapted(model, pixels.shape[2])
    made = _whole(self_ensemble(network) if tiles.ensemble else network, pixels, model, tiles, progress)
    if alpha is not None and model.scale != 1:
        bicubic = Bicubic(model.scale, 1)
        alpha = _whole(bicubic, alpha[..., None], bicubic, tiles, None)[..., 0]
    return replace(picture, pixels=made, alpha=alpha)


def adapted(model: Network, channels: int) -> Restore:
    """The network for pictures of so many channels."""
    if model.in_chans == channels:
        return model
    if channels == 1:
        return lambda image: model(image.repeat(1, model.in_chans, 1, 1)).mean(1, keepdim=True)
    if model.in_chans == 1:
        return lambda image: model(image.transpose(0, 1)).transpose(0, 1)
    raise SaccadeError(f"{type(model).__name__} takes {model.in_chans} channels, and the picture has {channels}")


def spread(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """(H, W, C) with the colours of the visible pixels drawn over those that alpha (H, W) hides wholly.

    Halved again and again by the mean of what is visible, the picture fills what is hidden at each size from the next
    smaller one (Gortler et al., "The Lumigraph", 1996: pull and push).
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return pixels
    seen = torch.from_numpy(~hidden)[None, None].float()
    levels = [(torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)[None] * seen, seen)]
    while max(levels[-1][0].shape[2:]) > 1:
        colour, seen = (F.avg_pool2d(F.pad(part, (0, part.shape[3] % 2, 0, part.shape[2] % 2)), 2)
                        for part in levels[-1])
        share = torch.where(seen > 0, seen, 1.0)
        levels.append((colour / share, (seen > 0).float()))
    filled = levels.pop()[0]
    while levels:
        colour, seen = levels.pop()
        larger = filled.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :colour.shape[2], :colour.shape[3]]
        filled = torch.where(seen > 0, colour, larger)
    return _stored(filled[0], pixels.dtype)


def _whole(
    restore: Restore, pixels: NDArray[Any], model: Network, tiles: Tiles, progress: Progress | None
) -> NDArray[Any]:
    """(scale H, scale W, C) of the depth of `pixels`; numbers become whole row by row, so no float copy is held."""
    scale, device = model.scale, next((p.device for p in model.parameters()), torch.device("cpu"))
    height, width, channels = pixels.shape
    made = np.empty((height * scale, width * scale, channels), pixels.dtype)
    for top, rows in restored_rows(restore, pixels, scale=scale, tile=tiles.tile, overlap=tiles.overlap, device=device,
                                   multiple=getattr(model, "multiple", 1), progress=progress):
        if not rows.isfinite().all():
            raise SaccadeError(f"the network's result is not finite in rows {top} to {top + rows.shape[1]}: "
                               "are these the weights of this model?")
        made[top:top + rows.shape[1]] = _stored(rows * int(np.iinfo(pixels.dtype).max), pixels.dtype)
    return made


def _stored(colours: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """(C, H, W) -> (H, W, C) whole numbers of a type, kept in its range."""
    return colours.round().clamp(0, int(np.iinfo(dtype).max)).movedim(0, -1).numpy().astype(dtype)
