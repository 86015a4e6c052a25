"""Pairs of patches to train a restoration network on: cut from pictures that are degraded on the fly, or from pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from saccade.core.errors import SaccadeError
from saccade.learn.pictures import SUFFIXES, read_image
from saccade.learn.reproducible import seed_of
from saccade.learn.restoration.degradations import Degradation
from saccade.learn.transforms import CACHE_BYTES

Source = Path | NDArray[np.uint8]
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]  # a clean picture (C, H, W), its degraded partner
MARGIN = 16  # degraded pixels around a patch, so that what a degradation does at borders stays outside


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """`patches[number, side]`: (degraded (C, side, side), clean (C, scale side, scale side)), in [0, 1].

    Which picture, where, turned and mirrored how, and all random numbers of the degradation follow from (seed, number)
    alone. `clean` are files or arrays (H, W, 3) uint8; what they become is `how`, a degradation, or the list of their
    degraded partners. A patch of a degradation is cut with a margin and degraded with it. Files are decoded at each
    use, or once and kept where their `pixels`, told in advance, are few. Raises SaccadeError for no picture, and where
    a pair does not fit.
    """

    def __init__(
        self, clean: Sequence[Source], how: Degradation | Sequence[Source], *, scale: int = 0, channels: int = 3,
        seed: int = 0, pixels: int | None = None,
    ) -> None:
        if not len(clean):
            raise SaccadeError("there is no picture to train on")
        self.clean, self.how, self.channels, self.seed = list(clean), how, channels, seed
        self.scale = scale or getattr(how, "scale", 1)
        if isinstance(how, Sequence) and len(how) != len(clean):
            raise SaccadeError(f"{len(clean)} clean and {len(how)} degraded pictures make no pairs")
        self.kept: list[Pair] | None = None
        if all(isinstance(one, np.ndarray) for one in clean) or (pixels or CACHE_BYTES) * channels < CACHE_BYTES:
            self.kept = [self._opened(which) for which in range(len(clean))]

    @property
    def fingerprint(self) -> str:
        """A hash of names and sizes (of arrays: contents) and of how pictures are degraded."""
        how = _said(self.how) if isinstance(self.how, Sequence) else repr(self.how)
        said = repr((_said(self.clean), how, self.scale, self.channels, self.seed))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        number, side = key
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        which, turns, flipped = (int(torch.randint(top, (), generator=generator)) for top in (len(self.clean), 4, 2))
        clean, partner = self._read(which)
        height, width = (length // self.scale for length in clean.shape[1:])  # in degraded pixels
        if min(height, width) < side:
            raise SaccadeError(f"{self._name(which)}: {clean.shape[2]}x{clean.shape[1]} pixels are too few for patches "
                               f"of {side * self.scale}; leave it out or train on smaller patches")
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (height, width))
        if not isinstance(self.how, Sequence):
            above, beside = min(top, MARGIN), min(left, MARGIN)
            area = (slice((top - above) * self.scale, min(top + side + MARGIN, height) * self.scale),
                    slice((left - beside) * self.scale, min(left + side + MARGIN, width) * self.scale))
            degraded = self.how(numbers(clean[(slice(None), *area)]), generator)
            cut = degraded[:, above:above + side, beside:beside + side]
        elif partner is not None:
            cut = numbers(partner[:, top:top + side, left:left + side])
        truth = numbers(clean[:, top * self.scale:(top + side) * self.scale,
                               left * self.scale:(left + side) * self.scale])
        return _turned(cut, turns, flipped), _turned(truth, turns, flipped)

    def _read(self, which: int) -> Pair:
        return self._opened(which) if self.kept is None else self.kept[which]

    def _opened(self, which: int) -> Pair:
        clean = decoded(self.clean[which], self.channels)
        if not isinstance(self.how, Sequence):
            return clean, None
        degraded = decoded(self.how[which], self.channels)
        if tuple(self.scale * side for side in degraded.shape[1:]) != clean.shape[1:]:
            raise SaccadeError(f"{self._name(which)}: {clean.shape[2]}x{clean.shape[1]} pixels are not {self.scale} "
                               f"times the {degraded.shape[2]}x{degraded.shape[1]} of its partner")
        return clean, degraded

    def _name(self, which: int) -> str:
        source = self.clean[which]
        return str(source) if isinstance(source, Path) else f"picture {which}"


def pictures_in(folder: Path, choose: Callable[[Path], bool] = Path.is_file) -> list[Path]:
    """The pictures in a folder and its sub-folders, sorted, that `choose` takes; raises SaccadeError where none is."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and choose(path))
    if not found:
        raise SaccadeError(f"{folder} holds no picture; these are read: {', '.join(SUFFIXES)}")
    return found


def pairs_in(clean: Path, degraded: Path) -> tuple[list[Path], list[Path]]:
    """Two folders whose pictures have the same names (up to the suffix); raises SaccadeError for one without."""
    first, second = ({path.relative_to(folder).with_suffix(""): path for path in pictures_in(folder)}
                     for folder in (clean, degraded))
    lonely = sorted(str(name) for name in first.keys() ^ second.keys())
    if lonely:
        raise SaccadeError(f"{len(lonely)} pictures of {clean} and {degraded} have no partner of the same name "
                           f"({', '.join(lonely[:3])}{', ...' if len(lonely) > 3 else ''})")
    return list(first.values()), [second[name] for name in first]


def _said(sources: Sequence[Source]) -> list[str]:
    return [f"{one.name}, {one.stat().st_size}" if isinstance(one, Path)
            else hashlib.sha256(one.tobytes()).hexdigest() for one in sources]


def decoded(source: Source, channels: int) -> NDArray[np.uint8]:
    """A picture (C, H, W), C 1 or 3."""
    image = read_image(source)
    pixels = np.asarray(image if channels == 3 else image.convert("L"))
    return np.ascontiguousarray(np.moveaxis(pixels if pixels.ndim == 3 else pixels[..., None], -1, 0))


def numbers(planes: NDArray[np.uint8]) -> Tensor:
    """In [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(planes)).float() / 255


def _turned(patch: Tensor, turns: int, flipped: int) -> Tensor:
    return torch.rot90(patch.flip(-1) if flipped else patch, turns, (-2, -1)).contiguous()
