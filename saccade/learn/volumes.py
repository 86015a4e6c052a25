"""Volumes: images of three axes from NIfTI or .npy files, as cubes to learn from without labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional
from saccade.learn.pictures import check_each, content_of, reason
from saccade.learn.transforms import Items

if TYPE_CHECKING:
    from saccade.learn.pretrain import Recipe

nibabel = optional("nibabel", extra="medical")

SUFFIXES = (".nii", ".nii.gz", ".npy")
EXTREME = 0.5  # per cent of the voxels at either end that are cut to those within


@dataclass(frozen=True, eq=False)
class Volumes:
    """Files of volumes."""

    name: str
    files: list[Path]
    notes: list[str]
    fingerprint: str

    def first(self, count: int) -> Volumes:
        return replace(self, files=self.files[:count])

    def items(self, recipe: Recipe, views: int) -> Items:
        return Cubes(self, recipe, augmented=views > 0)


class Cubes(Items):
    """Volumes as (1, S, S, S) float32 of mean 0 and deviation 1, whole, or random cubes of them, mirrored."""

    def __init__(self, volumes: Volumes, recipe: Recipe, augmented: bool) -> None:
        super().__init__(len(volumes.files))
        self.files, self.img_size = volumes.files, recipe.img_size
        self.smallest_crop, self.flip = recipe.smallest_crop, recipe.flip
        self.side = recipe.img_size * 3 // 2 if augmented else recipe.img_size
        if augmented:
            self.augment = self.cropped
        self.keep(volumes, self.side, 4 * self.side**3)

    def open(self, i: int) -> Tensor:
        return cube(read_volume(self.files[i]), self.side)

    def cropped(self, volume: Tensor) -> Tensor:
        """A cube that holds at least `smallest_crop` of the volume, scaled to S, each axis mirrored or not."""
        share = float(torch.empty(()).uniform_(self.smallest_crop, 1.0))
        side = max(1, round(self.side * share ** (1 / 3)))
        for axis in (1, 2, 3):
            volume = volume.narrow(axis, int(torch.randint(self.side - side + 1, ())), side)
        volume = F.interpolate(volume[None], [self.img_size] * 3, mode="trilinear")[0]
        mirrored = [axis for axis in (1, 2, 3) if self.flip and torch.rand(()) < 0.5]
        return volume.flip(mirrored)

    def normalised(self, batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """(B, 3, S, S, S): three equal channels, so that one model takes volumes and pictures."""
        return batch.expand(-1, 3, -1, -1, -1)


def cube(volume: Tensor, side: int) -> Tensor:
    """(X, Y, Z) -> (1, side, side, side): scaled axis by axis, the extremes cut, mean 0, deviation 1."""
    least = [min(length, side) for length in volume.shape]
    x = F.interpolate(volume[None, None], least, mode="area")  # means of what is more than needed
    x = F.interpolate(x, [side] * 3, mode="trilinear")[0]
    low, high = np.percentile(x.numpy(), (EXTREME, 100 - EXTREME))
    x = x.clamp(float(low), float(high))
    return (x - x.mean()) / (x.std() + 1e-6)


def read_volume(path: Path) -> Tensor:
    """(X, Y, Z) float32; the axes of NIfTI turned to point right, forward, up, as near as its own allow.

    Raises SaccadeError, one line that begins with the path, where it cannot be read, has not three axes, or holds
    something else than finite numbers.
    """
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    except SaccadeError:
        raise
    except Exception as error:
        raise SaccadeError(f"{path}: {reason(error)}") from error
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        known = {2: "it is a picture, save it as PNG", 4: "save one volume a file"}
        raise SaccadeError(f"{path}: an array of shape {values.shape}, and a volume has three axes; "
                           f"{known.get(values.ndim, 'leave it out')}")
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise SaccadeError(f"{path}: not all voxels are finite numbers (type {values.dtype}); mend or remove it")
    if min(values.shape) < 2:
        raise SaccadeError(f"{path}: {'x'.join(map(str, values.shape))} voxels are one slice, a picture where a volume "
                           "is expected; save it as PNG")
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def volume_files(folder: Path) -> list[Path]:
    """The volumes in a folder by their names, at any depth, sorted."""
    return sorted(path for path in folder.rglob("*")
                  if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."))


def open_volumes(root: str | Path, *, strict: bool = False) -> Volumes:
    """All volumes in a folder, every file read once; those that cannot be used are left out and noted.

    Raises:
        SaccadeError: none can be used; with `strict`, the first that cannot.
    """
    root, notes = Path(root).expanduser(), list[str]()
    files, contents = check_each(str(root), volume_files(root), _content, strict, notes)
    said = json.dumps([[path.relative_to(root).as_posix(), content]
                       for path, content in zip(files, contents, strict=True)])
    return Volumes(root.resolve().name, files, notes, hashlib.sha256(said.encode()).hexdigest())


def _content(path: Path) -> str:
    read_volume(path)
    return content_of(path)
