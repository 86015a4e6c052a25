"""One picture read as RGB, and the check of many before training: unreadable files and near-duplicates."""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from saccade.core.errors import SaccadeError

Item = TypeVar("Item")
Found = TypeVar("Found")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")  # of what scenes and restoration take
SMALLEST = 2  # pixels a side: below, there is nothing to scale
THUMB = (9, 8)  # width, height: eight differences a row, eight rows, 64 bits
NEAR_BITS = 2
NEAR_LEVELS = 4.0  # mean difference of two thumbs, of 255: recompression stays under 1
PATIENCE = 2.0  # seconds without a progress bar


class Checked(NamedTuple):
    """What the check learned of one file: `problem` is empty where it can be used."""

    problem: str
    content: str = ""  # byte count and checksum
    thumb: NDArray[np.uint8] | None = None
    transparent: bool = False
    deep: bool = False  # 16 bits a pixel
    size: tuple[int, int] = (0, 0)  # width and height, turned as EXIF says


def read_image(source: Path | NDArray[np.uint8]) -> Image.Image:
    """The picture in RGB, turned as its EXIF tag says; a gray array (H, W) becomes RGB too.

    Transparent pixels are laid on white. 16-bit gray keeps its full range: 65535 becomes 255. Of several frames the
    first is taken.

    Raises:
        SaccadeError: the file cannot be read any more.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    try:
        with Image.open(source) as image:
            return _as_rgb(image)
    except Exception as error:
        raise SaccadeError(f"{source}: {reason(error)}") from error


def check_picture(path: Path) -> Checked:
    """Decodes the whole file once; a broken one is told by `problem`, nothing is raised."""
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST:
                width, height = image.size
                return Checked(f"{width}x{height} pixels are too few, {SMALLEST}x{SMALLEST} is the least")
            turned = image.getexif().get(0x0112, 1) > 4  # a quarter, to one side or the other
            size = (image.height, image.width) if turned else image.size
            transparent, deep = image.has_transparency_data, image.mode.startswith("I")
            image.draft(None, (64, 64))  # a JPEG is decoded to its end, but at a fraction of the cost
            small = _as_rgb(image).resize(THUMB, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return Checked("", content_of(path), np.asarray(small), transparent, deep, size)
    except Exception as error:  # decoders of broken files raise whatever they like
        return Checked(reason(error))


def content_of(path: Path) -> str:
    """What identifies a file whatever its name and date: byte count and checksum."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return f"{size}:{checksum:08x}"


def check_each(
    where: str, items: Sequence[Item], check: Callable[[Item], Found], strict: bool, notes: list[str]
) -> tuple[list[Item], list[Found]]:
    """The items that `check` takes, and what it says of each; a SaccadeError of the others becomes a note.

    Raises:
        SaccadeError: with `strict`, the first of those; or where it takes none.
    """
    def looked_at(item: Item) -> Found | SaccadeError:
        try:
            return check(item)
        except SaccadeError as error:
            return error

    kept: list[tuple[Item, Found]] = []
    refused: list[SaccadeError] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for item, found in zip(items, pool.map(looked_at, items), strict=True):
            if not isinstance(found, SaccadeError):
                kept.append((item, found))
            elif strict:
                raise found
            else:
                refused.append(found)
    if not kept:
        raise SaccadeError(f"{where}: none of {len(items)} can be used; the first is {refused[0]}")
    notes += [f"skipped {error}" for error in refused]
    return [item for item, _ in kept], [found for _, found in kept]


def check_pictures(paths: Sequence[Path], names: Sequence[str], *, strict: bool) -> list[Checked]:
    """Checks every file, several at a time; after two seconds a terminal shows how far it is.

    Raises:
        SaccadeError: with `strict`, at the first file that cannot be used.
    """
    bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    started, shown, results = time.monotonic(), False, []
    try:
        for name, result in zip(names, pool.map(check_picture, paths), strict=True):
            if strict and result.problem:
                raise SaccadeError(f"{name}: {result.problem}; mend or remove it")
            results.append(result)
            if not shown and sys.stderr.isatty() and time.monotonic() - started > PATIENCE:
                task, shown = bar.add_task("checking images", total=len(paths)), True
                bar.start()
            if shown:
                bar.update(task, completed=len(results))
    finally:
        pool.shutdown(cancel_futures=True)
        if shown:
            bar.stop()
    return results


def find_near_duplicates(known: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Pairs (held-out picture, known picture) that look the same, at most one for each held-out picture.

    Both are thumbs (N, 8, 9, 3). The difference hash (is a pixel brighter than its left neighbour?) must agree but for
    two of 64 bits, and the thumbs themselves in colour: the hash alone confuses plain pictures.
    """
    pairs = []
    known_hashes = _difference_hash(known)
    for number, code in enumerate(_difference_hash(held_out)):
        alike = np.flatnonzero(np.bitwise_count(known_hashes ^ code) <= NEAR_BITS)
        if alike.size:
            levels = np.abs(known[alike].astype(np.int16) - held_out[number]).mean(axis=(1, 2, 3))
            if levels.min() <= NEAR_LEVELS:
                pairs.append((number, int(alike[levels.argmin()])))
    return pairs


def _difference_hash(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(N, 8, 9, 3) -> (N,), 64 bits."""
    gray = thumbs.sum(axis=-1, dtype=np.int64)
    bits = np.packbits((gray[:, :, 1:] > gray[:, :, :-1]).reshape(len(thumbs), -1), axis=1)
    return np.ascontiguousarray(bits).view(np.uint64).reshape(-1)


def _as_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise SaccadeError("pixels are 32-bit floats, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is what Pillow makes of some 16-bit files
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise SaccadeError("pixels exceed 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why a file cannot be used, in words."""
    if isinstance(error, SaccadeError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    message = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to open safely, make it smaller ({message})"
    return f"cannot be decoded ({message})"
