"""Images with class labels from a folder, a CSV file or a built-in set: found, checked, split."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from saccade.core.errors import SaccadeError
from saccade.learn.builtin import BUILTIN
from saccade.learn.pictures import check_pictures, find_near_duplicates, read_image
from saccade.learn.splits import SPLITS, draw_splits

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}
SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm",
                      ".tif", ".tiff", ".webp"))
NAMED = 3  # examples in a message
LISTED = 20  # skipped files with a line of their own


class Split(Dataset[tuple[Image.Image, int]]):
    """One part of a set: item i is (picture in RGB, label), read when it is asked for."""

    def __init__(self, sources: Sequence[Path | NDArray[np.uint8]], labels: list[int], paths: list[str]) -> None:
        self.sources, self.labels, self.paths = sources, labels, paths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.sources[index]), self.labels[index]


@dataclass
class ImageSet:
    """Labelled images in three parts. `notes`: what a reader of the results should know about them, one line each;
    `fingerprint`: the same for the same files (whatever their dates), labels and splits."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    notes: list[str]
    fingerprint: str


@dataclass(frozen=True)
class Item:
    """A labelled picture on its way into a split; `content` identifies what is in the file."""

    name: str
    label: str
    source: Path | NDArray[np.uint8]
    split: str = ""
    group: str = ""
    content: str = ""


def open_images(source: str | Path, *, seed: int = 0, strict: bool = False) -> ImageSet:
    """The images of a built-in set, a folder or a CSV file, every file checked, in train, val and test.

    - `tiles`, `planted`, `digits`: see `saccade.learn.builtin` (a folder of such a name is `./tiles`).
    - a folder: one sub-folder per class, at any depth inside it; or train/, test/ and perhaps val/ of such sub-folders.
    - a CSV file: columns path (relative to the file) and label, perhaps split (train, val, test) and group; images of
      one group, say one patient, never stand in two splits.

    Without splits, each class is split 60 / 20 / 20 with `seed`; without val, a fifth of train becomes val. Files that
    cannot be used are skipped and noted; near-duplicates of training images in val and test are noted. Pictures come
    in RGB, turned by EXIF, transparency on white, 16-bit gray scaled to 8 bits.

    Raises:
        SaccadeError: the source does not exist, has no images or one class, a split lacks a class, a class is too
            small to split, the CSV lacks columns or names missing files, a group stands in two given splits; with
            `strict`, a file that cannot be used.
    """
    where, location = str(source), Path(source).expanduser()
    notes: list[str] = []
    thumbs: dict[str, NDArray[np.uint8]] = {}
    if where in BUILTIN:
        name, items = where, _from_builtin(where, seed)
    elif location.is_dir():
        name, items = location.resolve().name, _from_folder(location, notes)
    elif location.is_file() and location.suffix.lower() == ".csv":
        name, items = location.stem, _from_csv(location)
    else:
        raise SaccadeError(_unknown(where, location))
    given = {item.split for item in items}
    classes = sorted({item.label for item in items})
    if len(classes) < 2:
        raise SaccadeError(f"{where}: one class only ({classes[0]}); a classifier needs two or more")
    _require_every_class(where, items, classes, given)
    _require_whole_groups(where, items)
    if where not in BUILTIN:
        items = _checked(where, items, strict, notes, thumbs)
    items = _in_splits(where, items, given, seed, notes)
    parts = {split: [item for item in items if item.split == split] for split in SPLITS}
    if thumbs:
        notes += _duplicate_notes(parts, thumbs)
    content = [[item.split, item.name, item.label, item.content] for split in SPLITS for item in parts[split]]
    fingerprint = hashlib.sha256(json.dumps([classes, content]).encode()).hexdigest()
    train, val, test = (_as_split(parts[split], classes) for split in SPLITS)
    return ImageSet(name, classes, train, val, test, notes, fingerprint)


def open_validation(root: str | Path) -> Split:
    """All images of a folder with one sub-folder per class, as ImageNet's val; labels number the sorted names.

    Raises:
        SaccadeError: the folder does not exist or has no sub-folders with images.
    """
    root = Path(root).expanduser()
    folders = _folders(root) if root.is_dir() else []
    files = [(path, label) for label, folder in enumerate(folders) for path in _files(folder)[0]]
    if not files:
        raise SaccadeError(f"{root}: no sub-folders with images; give a folder with one sub-folder per class")
    paths, labels = [path for path, _ in files], [label for _, label in files]
    return Split(paths, labels, [path.relative_to(root).as_posix() for path in paths])


def open_pictures(source: str | Path, *, strict: bool = False) -> ImageSet:
    """Pictures to learn from without their labels: those in the `train` part count, val and test may be empty.

    A built-in set, a CSV file or a labelled folder (see `open_images`) keeps its parts, so that what is learned can be
    probed on the others. Any other folder gives all pictures in it, at any depth, to train.

    Raises:
        SaccadeError: the source does not exist or has no picture that can be read; with `strict`, a file that cannot
            be used.
    """
    location = Path(source).expanduser()
    if str(source) in BUILTIN or not location.is_dir():
        return open_images(source, strict=strict)
    images, _ = _files(location)
    if not images:
        raise SaccadeError(f"{location}: no pictures in it, at any depth; PNG, JPEG, WebP or TIFF files are needed")
    loose, _ = _files(location, deep=False)
    if not loose:
        try:
            return open_images(source, strict=strict)
        except SaccadeError:  # no classes after all; files that cannot be used are told below
            pass
    notes = [f"{location} has no classes: all pictures in it are used"]
    items = [Item(path.relative_to(location).as_posix(), "", path, "train") for path in images]
    items = _checked(str(location), items, strict, notes, {})
    fingerprint = hashlib.sha256(json.dumps([[item.name, item.content] for item in items]).encode()).hexdigest()
    nothing = Split([], [], [])
    return ImageSet(location.resolve().name, [], _as_split(items, [""]), nothing, nothing, notes, fingerprint)


def _as_split(items: list[Item], classes: list[str]) -> Split:
    number = {label: index for index, label in enumerate(classes)}
    return Split([item.source for item in items], [number[item.label] for item in items], [i.name for i in items])


def _unknown(source: str, location: Path) -> str:
    if location.is_file():
        return f"{source}: a file, but not a CSV (.csv) with columns path and label; give a folder or a CSV"
    close = get_close_matches(source.lower(), BUILTIN, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{source}: no such folder or CSV file, and no built-in set ({', '.join(sorted(BUILTIN))}){meant}"


def _from_builtin(name: str, seed: int) -> list[Item]:
    pictures = BUILTIN[name](seed)
    splits = pictures.splits or [""] * len(pictures.labels)
    return [Item(path, label, image, split, content=hashlib.sha256(image.tobytes()).hexdigest())
            for image, label, path, split in zip(pictures.images, pictures.labels, pictures.names, splits, strict=True)]


# folders


def _from_folder(root: Path, notes: list[str]) -> list[Item]:
    folders = _folders(root)
    if not folders:
        images, _ = _files(root)
        if images:
            raise SaccadeError(f"{root}: {_count(images, 'image')} but no sub-folders; make one sub-folder per class")
        raise SaccadeError(f"{root}: no images; one sub-folder per class is needed, with image files in it")
    split_of = {folder: SPLIT_NAMES.get(folder.name.lower(), "") for folder in folders}
    found = Counter(split_of.values())
    if all(split_of.values()) or (found["train"] and found["test"]):
        return _from_split_folders(root, split_of, notes)
    items = _from_class_folders(root, root, "", notes)
    inner = _folders(folders[0])
    if len({item.label for item in items}) == 1 and len(inner) > 1:
        raise SaccadeError(f"{root}: one class only ({folders[0].name}); did you mean {folders[0]}, which has "
                           f"{len(inner)} sub-folders?")
    return items


def _from_split_folders(root: Path, split_of: dict[Path, str], notes: list[str]) -> list[Item]:
    """The layout train/, [val/], test/; folders beside them are left out and noted."""
    found = Counter(split_of.values())
    for split in ("train", "test"):
        if not found[split]:
            names = " and ".join(f"{folder.name}/" for folder in split_of)
            remedy = " (val/ is optional)" if split == "train" or not found["val"] else ", or rename val/ to test/"
            raise SaccadeError(f"{root}: has {names} but no {split}/; splits need train/ and test/{remedy}, "
                               "or give the folder that holds the class folders")
    items: list[Item] = []
    for folder, split in split_of.items():
        if not split:
            notes.append(f"ignored {folder.name}/, which stands beside train/ and test/")
        elif found[split] > 1:
            twice = " and ".join(f"{other.name}/" for other in split_of if split_of[other] == split)
            raise SaccadeError(f"{root}: {twice} both mean {split}; keep one")
        elif not _folders(folder):
            raise SaccadeError(f"{folder}: has no sub-folders; every split needs one sub-folder per class")
        else:
            items += _from_class_folders(root, folder, split, notes)
    return items


def _from_class_folders(root: Path, parent: Path, split: str, notes: list[str]) -> list[Item]:
    items = []
    loose, _ = _files(parent, deep=False)
    if loose:
        notes.append(f"ignored {_count(loose, 'image')} beside the class folders of {parent} ({_some(loose)})")
    for folder in _folders(parent):
        images, others = _files(folder)
        if not images:
            kinds = f", only {_count(others, 'file')} of other kinds ({_some(others)})" if others else ""
            raise SaccadeError(f"{folder}: the class has no images{kinds}; add images or remove the folder")
        if others:
            notes.append(f"ignored {_count(others, 'file')} in {folder} that are no images by name ({_some(others)})")
        # macOS writes é as two characters, others as one: the same class
        label = unicodedata.normalize("NFC", folder.name)
        items += [Item(path.relative_to(root).as_posix(), label, path, split) for path in images]
    return items


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, *, deep: bool = True) -> tuple[list[Path], list[Path]]:
    """Files that are images by name, and the others; hidden ones are neither."""
    images: list[Path] = []
    others: list[Path] = []
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if deep and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                (images if Path(name).suffix.lower() in SUFFIXES else others).append(Path(parent, name))
    return images, others


# CSV


def _from_csv(path: Path) -> list[Item]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            # a short row has None for what it lacks
            rows = [(reader.line_num, {key: (row[key] or "").strip() for key in header}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SaccadeError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    missing = [column for column in ("path", "label") if column not in header]
    if missing:
        raise SaccadeError(f"{path}: no column {' and '.join(missing)}; path,label[,split][,group] are needed, "
                           f"the header is: {','.join(header)}")
    if not rows:
        raise SaccadeError(f"{path}: has a header but no rows")
    split_rows = sum(bool(row.get("split")) for _, row in rows)
    items, first_line = [], dict[str, int]()
    for line, row in rows:
        split = row.get("split", "")
        if not row["path"] or not row["label"]:
            raise SaccadeError(f"{path}, line {line}: {'label' if row['path'] else 'path'} is empty")
        if split_rows and split.lower() not in SPLIT_NAMES:
            raise SaccadeError(f"{path}, line {line}: split is {split!r}; it must be train, val or test")
        name = Path(os.path.normpath(row["path"])).as_posix()
        if name in first_line:
            raise SaccadeError(f"{path}, line {line}: {name} stands already in line {first_line[name]}")
        first_line[name] = line
        group = (row.get("group") or f"alone in line {line}") if "group" in header else ""
        items.append(Item(name, row["label"], path.parent / name, SPLIT_NAMES.get(split.lower(), ""), group))
    lost = [item.name for item in items if not (path.parent / item.name).is_file()]
    if lost:
        raise SaccadeError(f"{path}: {len(lost)} of {len(items)} files are missing ({_some(lost)}); paths are relative "
                           f"to {path.parent}")
    given = {item.split for item in items if item.split}
    for split in ("train", "test"):
        if given and split not in given:
            raise SaccadeError(f"{path}: the split column has no {split}; it needs train and test (val is optional)")
    return items


# checks


def _checked(
    where: str, items: list[Item], strict: bool, notes: list[str], thumbs: dict[str, NDArray[np.uint8]]
) -> list[Item]:
    """The items whose files can be used; fills `thumbs` by name and tells in `notes` what was found."""
    paths = [item.source for item in items if isinstance(item.source, Path)]
    results = check_pictures(paths, [item.name for item in items], strict=strict)
    kept: list[Item] = []
    skipped: dict[str, Item] = {}  # by the line about it
    for item, result in zip(items, results, strict=True):
        if result.thumb is None:
            skipped[f"{item.name}: {result.problem}"] = item
        else:
            kept.append(replace(item, content=result.content))
            thumbs[item.name] = result.thumb
    usable = {(item.split, item.label) for item in kept}
    for line, item in skipped.items():
        if (item.split, item.label) not in usable:
            place = f" in {item.split}" if item.split else ""
            raise SaccadeError(f"{where}: no image of class {item.label}{place} can be read; the first is {line}")
    transparent = [result for result in results if result.transparent]
    deep = [result for result in results if result.deep]
    if transparent:
        notes.append(f"laid {_count(transparent, 'image')} with transparency on white")
    if deep:
        notes.append(f"scaled {_count(deep, 'image')} of 16 bits a pixel to 8 bits")
    if len(skipped) > LISTED:
        notes.append(f"skipped {len(skipped)} of {len(items)} files; the first {LISTED} follow")
    notes += [f"skipped {line}" for line in list(skipped)[:LISTED]]
    return kept


def _require_every_class(where: str, items: list[Item], classes: list[str], given: set[str]) -> None:
    present = {(item.split, item.label) for item in items}
    for split in sorted(given):
        for label in classes:
            if (split, label) not in present:
                place = f" in {split}" if split else ""
                raise SaccadeError(f"{where}: class {label} has no image{place}; every split needs every class")


def _require_whole_groups(where: str, items: list[Item]) -> None:
    splits_of = defaultdict(set)
    for item in items:
        if item.group:
            splits_of[item.group].add(item.split)
    crossing = [group for group, splits in splits_of.items() if len(splits) > 1]
    if crossing:
        splits = " and ".join(split for split in SPLITS if split in splits_of[crossing[0]])
        raise SaccadeError(f"{where}: group {crossing[0]} stands in {splits} ({len(crossing)} groups cross splits); "
                           "put each group in one split")


def _duplicate_notes(parts: dict[str, list[Item]], thumbs: dict[str, NDArray[np.uint8]]) -> list[str]:
    known, held_out = parts["train"], parts["val"] + parts["test"]
    pairs = find_near_duplicates(*(np.stack([thumbs[item.name] for item in part]) for part in (known, held_out)))
    if not pairs:
        return []
    shown = _some(f"{held_out[one].name} = {known[other].name}" for one, other in pairs)
    return [f"{_count(pairs, 'image')} of val and test nearly equal to one of train, scores will flatter ({shown})"]


def _in_splits(where: str, items: list[Item], given: set[str], seed: int, notes: list[str]) -> list[Item]:
    """Every item with its split: given, or drawn."""
    if "val" in given:
        return items
    pool = [item for item in items if item.split != "test"]
    held = ("val",) if "test" in given else ("val", "test")
    if len(held) == 1:
        notes.append(f"val is a fifth of train, drawn with seed {seed}")
    drawn = draw_splits(where, [item.label for item in pool], [item.group for item in pool], held, seed)
    split_of = {item.name: split for item, split in zip(pool, drawn, strict=True)}
    return [replace(item, split=split_of.get(item.name, "test")) for item in items]


def _some(names: Iterable[str | Path]) -> str:
    """The first few names, and dots."""
    shown = [name.name if isinstance(name, Path) else name for name in names]
    return ", ".join(shown[:NAMED]) + (", ..." if len(shown) > NAMED else "")


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"
