"""Image sets that come inside scikit-image and scikit-learn: real pictures without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saccade.core.optional import optional

skimage_data = optional("skimage.data", extra="train")
sklearn_datasets = optional("sklearn.datasets", extra="train")

# class -> function of skimage.data; all of them are inside the wheel
PHOTOGRAPHS = {
    "astronaut": "astronaut", "brick": "brick", "camera": "camera", "cat": "cat", "coffee": "coffee",
    "coins": "coins", "grass": "grass", "gravel": "gravel", "hubble": "hubble_deep_field", "moon": "moon",
    "motorcycle": "stereo_motorcycle", "page": "page", "retina": "retina", "rocket": "rocket", "text": "text",
    "tissue": "immunohistochemistry",
}
TILES_PER_CLASS = {"train": 200, "val": 40, "test": 80}
TILE, CELL, MARGIN = 32, 56, 4  # pixels
PATTERN = ("train", "train", "train", "val", "test")
PATCH = 8  # pixels of the square that decides in `planted`
FLAT = 4.0  # standard deviation below which a tile shows nothing (night sky, the black frame of the retina)


class Pictures(NamedTuple):
    """Gray pictures (N, H, W) uint8 with their class names, unique names and, where it is fixed, their split."""

    images: NDArray[np.uint8]
    labels: list[str]
    names: list[str]
    splits: list[str] | None


def cell_split(column: int, row: int) -> str:
    """Split of a cell of the photograph: fifths, shifted from row to row so that no split owns a corner."""
    return PATTERN[(column + 2 * row) % len(PATTERN)]


def tiles(seed: int = 0, upright: bool = False) -> Pictures:
    """Which of sixteen photographs is this tile from?  3200 train, 640 val, 1280 test tiles of 32x32.

    Each photograph is cut into cells of 56x56; a cell belongs to one split and tiles stay 4 pixels short of its right
    and lower edge, so tiles of different splits share no pixel. A tile is a square of 32 to 52 pixels, scaled to 32,
    gray, turned and mirrored at random, brought to one mean and contrast: neither colour nor brightness tells.
    Pixel 1-nearest-neighbour gets 21 %, a narrow convolutional network 70 % (chance: 6 %).
    `upright`: the same squares as they lie in the photograph. Names read `photograph/x-y-side`.
    """
    generator = np.random.default_rng(seed)
    images, labels, names, splits = [], [], [], []
    for label, function in PHOTOGRAPHS.items():
        photograph = _gray(getattr(skimage_data, function)())
        cells: dict[str, list[tuple[int, int]]] = {split: [] for split in TILES_PER_CLASS}
        for row in range(photograph.height // CELL):
            for column in range(photograph.width // CELL):
                cells[cell_split(column, row)].append((column * CELL, row * CELL))
        for split, count in TILES_PER_CLASS.items():
            drawn: set[tuple[int, int, int]] = set()
            while len(drawn) < count:
                side = int(generator.integers(TILE, CELL - MARGIN + 1))
                left, top = cells[split][int(generator.integers(len(cells[split])))]
                x, y = (int(corner + generator.integers(CELL - MARGIN - side + 1)) for corner in (left, top))
                # crop, then scale: scaling with `box=` would read pixels beyond the square
                square = photograph.crop((x, y, x + side, y + side))
                tile = np.asarray(square.resize((TILE, TILE), Image.Resampling.BILINEAR), np.float64)
                if tile.std() < FLAT or (x, y, side) in drawn:
                    continue
                drawn.add((x, y, side))
                tile = np.clip(128 + 48 * (tile - tile.mean()) / tile.std(), 0, 255).round()
                turns, mirrored = int(generator.integers(4)), generator.integers(2)
                if not upright:
                    tile = np.rot90(tile, turns)[:, :: -1 if mirrored else 1]
                images.append(tile.astype(np.uint8))
                labels.append(label)
                names.append(f"{label}/{x}-{y}-{side}")
                splits.append(split)
    return Pictures(np.stack(images), labels, names, splits)


def digits(seed: int = 0) -> Pictures:
    """1797 scans of handwritten digits, 8x8 (Alpaydin and Kaynak, 1998): learned in seconds, to try a pipeline."""
    bunch = sklearn_datasets.load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)  # the scans count ink from 0 to 16
    labels = [str(target) for target in bunch.target]
    return Pictures(images, labels, [f"{label}/{number:04d}" for number, label in enumerate(labels)], None)


def planted(seed: int = 0) -> Pictures:
    """Tiles, dimmed, on which one 8x8 square decides: lying or standing stripes, or checks; the tile tells nothing.

    Of each two tiles one, 1600 train, 320 val, 640 test: whoever is asked what decided must point at the square. Names
    read `class/number-x-y`, its left upper corner (`planted_box`).
    """
    generator, background = np.random.default_rng(seed), tiles(seed)
    bars = np.arange(PATCH) // 2 % 2
    patterns = {"checks": bars[:, None] ^ bars, "lying": bars[:, None] | 0 * bars, "standing": 0 * bars[:, None] | bars}
    assert background.splits is not None
    images, splits = background.images[::2] // 2 + 64, background.splits[::2]
    labels, names = [], []
    for number, image in enumerate(images):
        label = sorted(patterns)[int(generator.integers(len(patterns)))]
        x, y = generator.integers(TILE - PATCH + 1, size=2).tolist()
        image[y : y + PATCH, x : x + PATCH] = 32 + 192 * patterns[label]
        labels.append(label)
        names.append(f"{label}/{number:04d}-{x}-{y}")
    return Pictures(images, labels, names, splits)


def planted_box(name: str) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of the square that decides in the picture `name` of `planted`."""
    x, y = map(int, name.split("-")[1:])
    return x, y, x + PATCH, y + PATCH


def _gray(pixels: Any) -> Image.Image:
    """The photograph as one gray channel; of a stereo pair the left one."""
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("L")


BUILTIN: dict[str, Callable[[int], Pictures]] = {"tiles": tiles, "digits": digits, "planted": planted}
