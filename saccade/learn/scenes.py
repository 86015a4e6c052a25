"""Scenes: the same view as a picture, a map of depths, a map of classes; for methods that learn from them together.

    ROOT/rgb/kitchen/0001.jpg   ROOT/depth/kitchen/0001.npy   ROOT/labels/kitchen/0001.png

A folder a modality, files of the same names up to the suffix, of one size a scene.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional
from saccade.learn.pictures import SUFFIXES as PICTURES
from saccade.learn.pictures import check_each, content_of, read_image, reason
from saccade.learn.transforms import Items, normalise
from saccade.papers.multimae import CLASSES, SHRINK

if TYPE_CHECKING:
    from saccade.learn.pretrain import Recipe

v2 = optional("torchvision.transforms.v2", extra="train")
tv_tensors = optional("torchvision.tv_tensors", extra="train")

FOLDERS = {"rgb": "rgb", "depth": "depth", "labels": "semseg"}  # to the modalities of multimae
SUFFIXES = {"rgb": PICTURES, "depth": (".npy", ".png", ".tif", ".tiff"), "labels": (".npy", ".png")}
TRIMMED = 0.1  # share of the depths at either end that mean and deviation leave out
BYTES = {"rgb": 3, "depth": 4, "labels": 1}  # a pixel


@dataclass(frozen=True, eq=False)
class Scenes:
    """Files of each scene by the names of their folders."""

    name: str
    files: list[dict[str, Path]]
    notes: list[str]
    fingerprint: str

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(FOLDERS[folder] for folder in self.files[0])

    def first(self, count: int) -> Scenes:
        return replace(self, files=self.files[:count])

    def items(self, recipe: Recipe, views: int) -> Items:
        return SceneItems(self, recipe, augmented=views > 0)


class SceneItems(Items):
    """Scenes as {"rgb": (3, S, S) uint8, "depth": (1, S, S) float32, "labels": (1, S, S) uint8}, cropped alike."""

    def __init__(self, scenes: Scenes, recipe: Recipe, augmented: bool) -> None:
        super().__init__(len(scenes.files))
        self.files = scenes.files
        side = recipe.img_size * 3 // 2 if augmented else recipe.img_size
        self.decode = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
        if augmented:
            steps: list[Any] = [v2.RandomResizedCrop(recipe.img_size, (recipe.smallest_crop, 1.0), antialias=True)]
            self.augment = v2.Compose([*steps, v2.RandomHorizontalFlip()] if recipe.flip else steps)
        self.keep(scenes, side, side**2 * sum(BYTES[folder] for folder in scenes.files[0]))

    def open(self, i: int) -> dict[str, Tensor]:
        # torchvision scales a mask by its nearest values, and draws one crop for all that it is given
        kinds = {folder: tv_tensors.Mask if folder == "labels" else tv_tensors.Image for folder in FOLDERS}
        found: dict[str, Tensor] = self.decode(
            {folder: kinds[folder](READERS[folder](path)) for folder, path in self.files[i].items()})
        return found

    def normalised(self, batch: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
        """As MultiViT takes them: class numbers at a quarter of the sides, by the pixel right of the middle of each."""
        ways = {"rgb": lambda x: normalise(x, mean, std), "depth": standardised,
                "labels": lambda x: x[:, 0, SHRINK // 2::SHRINK, SHRINK // 2::SHRINK].long()}
        return {FOLDERS[folder]: ways[folder](values) for folder, values in batch.items()}


def standardised(depth: Tensor) -> Tensor:
    """(B, 1, H, W): (depth - mean) / deviation of each map, both without the tenth nearest and farthest.

    (Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", 2022.)
    """
    values = depth.flatten(1).sort(1).values
    cut = int(TRIMMED * values.shape[1])
    values = values[:, cut:values.shape[1] - cut]
    mean, variance = (each[:, None, None, None] for each in (values.mean(1), values.var(1)))
    return (depth - mean) / (variance + 1e-6).sqrt()


def modality_folders(root: Path) -> list[str]:
    """Which of the folders of modalities stand in `root`; none where "rgb" stands alone or nothing."""
    found = [folder for folder in FOLDERS if (root / folder).is_dir()]
    return found if set(found) - {"rgb"} else []


def open_scenes(root: str | Path, *, strict: bool = False) -> Scenes:
    """The scenes of a folder with a sub-folder a modality: rgb, depth, labels; every file is read once.

    Depth is any number a pixel, a .npy array (H, W) or a gray PNG or TIFF of 8 or 16 bits; labels are class numbers
    from 0, a .npy array or a gray or palette PNG. A scene with a file that cannot be used is left out and noted.

    Raises:
        SaccadeError: a file without partner, two of one name, modalities of different sizes, no scene at all; with
            `strict`, a file that cannot be used.
    """
    root = Path(root).expanduser()
    folders = {folder: _by_stem(root / folder, SUFFIXES[folder]) for folder in modality_folders(root)}
    stems = sorted(set().union(*folders.values()))
    if not stems:
        raise SaccadeError(f"{root}: no files in {', '.join(folders)}")
    for stem in stems:
        lonely = [folder for folder, files in folders.items() if stem not in files]
        if lonely:
            there = next(files[stem] for files in folders.values() if stem in files)
            raise SaccadeError(f"{there}: has no partner in {root / lonely[0]} "
                               f"({' or '.join(SUFFIXES[lonely[0]])}); add it or remove the scene")
    others = sorted(path.name for path in root.iterdir()
                    if path.is_dir() and path.name not in folders and not path.name.startswith("."))
    notes = [f"ignored {name}/, which is no modality: {', '.join(FOLDERS)} are" for name in others]
    every = [{folder: files[stem] for folder, files in folders.items()} for stem in stems]
    files, looked_at = check_each(str(root), every, _looked_at, strict, notes)
    for _, sizes in looked_at:
        (first, size), *rest = sizes.items()
        for path, other in rest:
            if other != size:
                raise SaccadeError(f"{path}: {other[1]}x{other[0]} pixels, and {first} has {size[1]}x{size[0]}: "
                                   "modalities of different sizes; scale them to one")
    said = json.dumps([[*(path.relative_to(root).as_posix() for path in scene.values()), content]
                       for scene, (content, _) in zip(files, looked_at, strict=True)])
    return Scenes(root.resolve().name, files, notes, hashlib.sha256(said.encode()).hexdigest())


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by their path in the folder without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise SaccadeError(f"{path}: {found[stem].name} has the same name; keep one of them")
            found[stem] = path
    return found


def _looked_at(scene: dict[str, Path]) -> tuple[str, dict[Path, tuple[int, ...]]]:
    """What identifies the files of a scene, all read, and their sizes (H, W)."""
    sizes = {path: tuple(READERS[folder](path).shape[1:]) for folder, path in scene.items()}
    return " ".join(content_of(path) for path in sizes), sizes


def _read_rgb(path: Path) -> Tensor:
    pixels: Tensor = v2.functional.pil_to_tensor(read_image(path))
    return pixels


def _read_depth(path: Path) -> Tensor:
    depth = _plane(path, "depths").astype(np.float32)
    if not np.isfinite(depth).all():
        raise SaccadeError(f"{path}: some depths are not finite; give them a number, such as the largest")
    return torch.from_numpy(depth)[None]


def _read_labels(path: Path) -> Tensor:
    labels = _plane(path, "class numbers")
    if labels.dtype.kind not in "biu":
        raise SaccadeError(f"{path}: {labels.dtype} are no class numbers; save integers")
    if labels.min() < 0 or labels.max() >= CLASSES:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise SaccadeError(f"{path}: class {wrong} is outside 0 to {CLASSES - 1}; number the classes anew")
    return torch.from_numpy(labels.astype(np.uint8))[None]


def _plane(path: Path, what: str) -> NDArray[Any]:
    """One number a pixel, (H, W); raises SaccadeError where the file holds something else."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.asarray(image)
    except Exception as error:
        raise SaccadeError(f"{path}: {reason(error)}") from error
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise SaccadeError(f"{path}: an array of shape {values.shape} and type {values.dtype}, and {what} are one "
                           "number a pixel")
    return values


READERS = {"rgb": _read_rgb, "depth": _read_depth, "labels": _read_labels}
