"""The pictures that a restoration network learns from and those it is measured on: found, checked, parted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from saccade.core.errors import SaccadeError
from saccade.learn.data import SPLIT_NAMES
from saccade.learn.pictures import check_pictures
from saccade.learn.restoration.degradations import Degradation
from saccade.learn.restoration.patches import Patches, decoded, numbers, pairs_in, pictures_in
from saccade.learn.restoration.train import Held

SHARE, MOST = 0.1, 20  # of the pictures are held out, where they are not parted
SIDE = 256  # pixels of the middle of a held-out picture, on which a network is measured
LEAST = 16  # pixels that a degraded picture needs to be measured


@dataclass(frozen=True)
class Pictures:
    """What is trained and measured on; `notes`: what a reader of the results should know, one line each."""

    name: str
    patches: Patches
    held: Held
    notes: list[str]


@dataclass(frozen=True)
class _Item:
    name: str
    clean: Path
    degraded: Path | None
    size: tuple[int, int] = (0, 0)  # of the clean picture


def open_pictures(
    clean: Path, how: Degradation | Path, *, scale: int, channels: int, smallest: int, strict: bool = False
) -> Pictures:
    """Pictures of a folder, at any depth, degraded by `how`, or with partners of the same names in the folder `how`.

    Folders train/ and val/ directly inside part them; else a tenth is held out, drawn by a fixed seed. Files that
    cannot be read are left out and noted. `smallest` is the side of the largest patches, in degraded pixels. Raises
    SaccadeError for fewer than two pictures, a picture without partner or of another size than its partner's times
    `scale`, one smaller than the patches, and with `strict` for a file that cannot be read.
    """
    for folder in (clean, how):
        if isinstance(folder, Path) and not folder.is_dir():
            raise SaccadeError(f"{folder}: there is no such folder; give one with PNG, JPEG, WebP or TIFF pictures")
    files = pairs_in(clean, how) if isinstance(how, Path) else (pictures_in(clean), None)
    partners: Sequence[Path | None] = files[1] or [None] * len(files[0])
    items = [_Item(path.relative_to(clean).as_posix(), path, partner)
             for path, partner in zip(files[0], partners, strict=True)]
    notes: list[str] = []
    items = _checked(items, scale, notes, strict)
    if len(items) < 2:
        raise SaccadeError(f"{clean}: {len(items)} picture that can be read; two are needed, since one is held out")
    _require_sides(items, smallest, scale)
    trained, held = _parted(items, notes)

    def sources(some: list[_Item]) -> Degradation | list[Path]:
        return [item.degraded for item in some if item.degraded] if isinstance(how, Path) else how

    pixels = sum(item.size[0] * item.size[1] for item in trained) * (2 if isinstance(how, Path) else 1)
    patches = Patches([item.clean for item in trained], sources(trained), scale=scale, channels=channels, pixels=pixels)
    return Pictures(clean.resolve().name, patches, _middles(held, how, scale, channels), notes)


def _checked(items: list[_Item], scale: int, notes: list[str], strict: bool) -> list[_Item]:
    """Those that can be read, with their sizes."""
    results = check_pictures([item.clean for item in items], [str(item.clean) for item in items], strict=strict)
    pairs = [(item, item.degraded) for item in items if item.degraded is not None]
    others = dict(zip((item.name for item, _ in pairs), check_pictures(
        [path for _, path in pairs], [str(path) for _, path in pairs], strict=strict), strict=True))
    kept = []
    for item, result in zip(items, results, strict=True):
        other = others.get(item.name, result)
        if result.problem or other.problem:
            broken = item.clean if result.problem else item.degraded
            notes.append(f"skipped {broken}: {result.problem or other.problem}")
            continue
        if item.degraded is not None and tuple(scale * side for side in other.size) != result.size:
            raise SaccadeError(f"{item.clean}: {_sides(result.size)} pixels are not {scale} times the "
                               f"{_sides(other.size)} of its partner {item.degraded}")
        kept.append(replace(item, size=result.size))
    return kept


def _require_sides(items: list[_Item], smallest: int, scale: int) -> None:
    small = [item for item in items if min(item.size) // scale < max(smallest, LEAST)]
    if small:
        more = f" ({len(small)} pictures are too small)" if len(small) > 1 else ""
        raise SaccadeError(f"{small[0].clean}: {_sides(small[0].size)} pixels are too few for patches of "
                           f"{max(smallest, LEAST) * scale}{more}; leave such out, or train on smaller patches")


def _parted(items: list[_Item], notes: list[str]) -> tuple[list[_Item], list[_Item]]:
    """Those to train on and those to measure on."""
    parts = [SPLIT_NAMES.get(Path(item.name).parts[0].lower(), "") for item in items]
    if {"train", "val"} <= set(parts):
        if others := len(parts) - parts.count("train") - parts.count("val"):
            notes.append(f"ignored {others} pictures beside those in train/ and val/")
        return ([item for item, part in zip(items, parts, strict=True) if part == "train"],
                [item for item, part in zip(items, parts, strict=True) if part == "val"])
    count = min(MOST, max(1, round(SHARE * len(items))))
    drawn = set(np.random.default_rng(0).permutation(len(items))[:count].tolist())
    notes.append(f"{count} of {len(items)} pictures are held out to measure on")
    return ([item for number, item in enumerate(items) if number not in drawn],
            [item for number, item in enumerate(items) if number in drawn])


def _middles(held: list[_Item], how: Degradation | Path, scale: int, channels: int) -> Held:
    """The middle of each held-out picture, of whole degraded pixels, and what it is degraded to."""
    pairs = []
    for number, item in enumerate(held):
        truth = decoded(item.clean, channels)
        sides = [min(SIDE // scale, side // scale) for side in truth.shape[1:]]  # in degraded pixels
        begin = [(side // scale - part) // 2 for side, part in zip(truth.shape[1:], sides, strict=True)]
        rows, columns = (slice(first, first + part) for first, part in zip(begin, sides, strict=True))
        whole = (slice(rows.start * scale, rows.stop * scale), slice(columns.start * scale, columns.stop * scale))
        clean = numbers(truth[:, whole[0], whole[1]])
        degraded = (numbers(decoded(item.degraded, channels)[:, rows, columns]) if item.degraded is not None
                    else how(clean, torch.Generator().manual_seed(number)))  # type: ignore[operator]
        pairs.append((degraded[None], clean[None]))
    return pairs


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
