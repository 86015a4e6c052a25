"""`saccade trust`: one table of how well methods explain models, on clean and on corrupted pictures.

Where an object's box is known the pointing game asks whether a map's peak lies in it; deletion and insertion ask
whether the class goes and comes with the pixels that the map puts first. `random` is a map without a thought: what any
must beat.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from saccade.attribution.explanation import explain
from saccade.attribution.trust import deletion, insertion
from saccade.core.errors import SaccadeError
from saccade.learn.builtin import planted_box
from saccade.learn.data import Split, open_images
from saccade.papers.explainable_robust import NINE, corrupt, pointing_game
from saccade.parts.scores import scores
from saccade.tools.classifiers import Classifier, open_classifier
from saccade.tools.contestants import reason
from saccade.tools.explain import chosen_methods

RANDOM = "random"
STEPS = 16  # of deletion and insertion
SCORED = 400  # pictures that accuracy is measured on
BATCH = 64
SIDES = ("left", "top", "right", "bottom")  # of a box, pixels
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """What `saccade trust` is asked. `boxes`: a CSV of path, left, top, right, bottom in pixels of the pictures."""

    data: str
    models: Sequence[str]
    methods: Sequence[str] = NINE
    corruptions: Sequence[str] = ("noise", "blur", "contrast", "jpeg")
    strength: int = 3
    pictures: int = 16
    boxes: Path | None = None
    pretrained: bool = False
    strict: bool = False


def judge(trial: Trial, progress: Progress = lambda text, done, total: None) -> dict[str, Any]:
    """The scores of every model, condition and method, as plain data.

    `models`: one entry a model, with `accuracy` and `confidence` (p of the true class) a condition, and `scores`, a row
    a condition and method (None where a method fails: `failed` says why). The true class is explained.
    Raises SaccadeError before any work for what can be known to be wrong.
    """
    methods = [RANDOM, *chosen_methods(trial.methods)]
    if not trial.models:
        raise SaccadeError("there is no model: give --models NAME,FOLDER,...")
    if trial.pictures < 1:
        raise SaccadeError(f"pictures is {trial.pictures}: give 1 or more")
    conditions = ["clean", *dict.fromkeys(trial.corruptions)]
    for name in conditions[1:]:
        corrupt(torch.zeros(1, 3, 16, 16), name, trial.strength)
    images = open_images(trial.data, strict=trial.strict)
    chosen, boxes = spread(images.test, trial.pictures), _boxes(trial, images.test)
    models = [(name, open_classifier(name, pretrained=trial.pretrained)) for name in trial.models]
    numbers = [_numbers(classifier, images.classes) for _, classifier in models]
    total, done = len(models) * len(conditions) * len(methods), 0
    found = []
    for (name, classifier), classes in zip(models, numbers, strict=True):
        see = _seen(classifier, images.test, classes)
        pixels, target = see(chosen)
        many, truth = see(spread(images.test, SCORED))
        where = _objects(classifier, images.test, chosen, boxes)
        entry: dict[str, Any] = {"model": name, "accuracy": {}, "confidence": {}, "scores": []}
        for condition in conditions:
            image, crowd = (classifier.normalised(
                one if condition == "clean" else corrupt(one, condition, trial.strength)) for one in (pixels, many))
            chances = probabilities(classifier, crowd)
            entry["accuracy"][condition] = float((chances.argmax(1) == truth).float().mean())
            confidence = probabilities(classifier, image).gather(1, target[:, None]).mean()
            entry["confidence"][condition] = float(confidence)
            for method in methods:
                progress(f"{name}, {condition}, {method}", done, total)
                done += 1
                entry["scores"].append({"condition": condition, "method": method,
                                        **_scored(classifier, image, target, where, method)})
        found.append(entry)
    return {"data": images.name, "pictures": len(chosen), "with_boxes": len(boxes), "strength": trial.strength,
            "conditions": conditions, "methods": methods, "models": found}


def _scored(
    classifier: Classifier, image: Tensor, target: Tensor, where: Tensor | None, method: str
) -> dict[str, Any]:
    try:
        if method == RANDOM:
            maps = torch.rand(image[:, 0].shape, generator=torch.Generator().manual_seed(0))
        else:
            maps = explain(classifier.model, image, method, target).maps
        row: dict[str, Any] = {
            score.__name__: float(score(classifier.model, image, maps, target, STEPS).mean())
            for score in (deletion, insertion)}
    except Exception as error:  # one method that a model does not suit does not stop the table
        return {"pointing": None, "deletion": None, "insertion": None, "failed": reason(error)}
    pointing = None
    if where is not None:
        inside = where.flatten(1).any(1)  # a box may have been cropped away
        # A random peak hits by its share of the picture, which is known without drawing.
        hits = where.flatten(1).float().mean(1) if method == RANDOM else pointing_game(maps, where).float()
        pointing = float(hits[inside].mean()) if inside.any() else None
    return {"pointing": pointing, **row, "failed": None}


@torch.no_grad()
def probabilities(classifier: Classifier, image: Tensor) -> Tensor:
    """(B, classes), batch by batch."""
    return torch.cat([scores(classifier.model, part).softmax(1) for part in image.split(BATCH)])


def spread(split: Split, count: int) -> list[int]:
    """Up to `count` numbers of pictures, evenly over the split."""
    return sorted(set(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int).tolist()))


def _seen(classifier: Classifier, split: Split, classes: Sequence[int]) -> Callable[[list[int]], tuple[Tensor, Tensor]]:
    def see(numbers: list[int]) -> tuple[Tensor, Tensor]:
        pictures = torch.stack([classifier.see(split[number][0]) for number in numbers])
        return classifier.pixels(pictures), torch.tensor([classes[split.labels[number]] for number in numbers])

    return see


def _numbers(classifier: Classifier, classes: Sequence[str]) -> list[int]:
    """The number that the model gives each class of the set: by name, else, where there are as many, in order."""
    if classifier.classes and set(classes) <= set(classifier.classes):
        return [classifier.classes.index(one) for one in classes]
    size = classifier.see(Image.new("RGB", (64, 64))).shape
    with torch.no_grad():
        count = scores(classifier.model, torch.zeros(1, *size)).shape[1]
    if count != len(classes):
        raise SaccadeError(f"{classifier.name} has {count} classes, the set {len(classes)} ({', '.join(classes[:3])}, "
                           "...): give models trained on it (`saccade train`)")
    return list(range(count))


def _boxes(trial: Trial, split: Split) -> dict[str, tuple[int, ...]]:
    if trial.boxes is None:
        return {name: planted_box(name) for name in split.paths} if trial.data == "planted" else {}
    try:
        rows = csv.DictReader(io.StringIO(trial.boxes.read_text(encoding="utf-8-sig")))
        found = {row["path"]: tuple(round(float(row[side])) for side in SIDES) for row in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SaccadeError(f"{trial.boxes} cannot be read as boxes ({reason(error)}): give a CSV with the columns "
                           "path, left, top, right, bottom, in pixels") from error
    if not set(found) & set(split.paths):
        raise SaccadeError(f"{trial.boxes} has no picture of the test part: paths are as in {split.paths[0]}")
    return found


def _objects(
    classifier: Classifier, split: Split, numbers: Sequence[int], boxes: dict[str, tuple[int, ...]]
) -> Tensor | None:
    """(B, H, W): which pixels that the model sees are the object; its preprocessing also scales and crops the box."""
    if not boxes:
        return None
    masks = []
    for number in numbers:
        drawn = Image.new("RGB", split[number][0].size)
        if (box := boxes.get(split.paths[number])) is not None:
            left, top, right, bottom = box
            ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill="white")
        masks.append(classifier.pixels(classifier.see(drawn)[None])[0, 0] > 0.5)
    return torch.stack(masks)


def table(found: dict[str, Any]) -> str:
    """The results as one Markdown table: a row a model and method, clean beside the mean over the corruptions."""
    corrupted = found["conditions"][1:]
    lines = ["| model | method | pointing % | deletion | insertion" + " | corrupted: pointing % | deletion | insertion"
             * bool(corrupted) + " |", "| --- | --- |" + " --- |" * (6 if corrupted else 3)]
    for entry in found["models"]:
        accuracy, confidence = entry["accuracy"], entry["confidence"]
        said = f"accuracy {accuracy['clean']:.0%}, p {confidence['clean']:.2f}"
        if corrupted:
            said += (f"; corrupted {np.mean([accuracy[one] for one in corrupted]):.0%}, "
                     f"p {np.mean([confidence[one] for one in corrupted]):.2f}")
        lines.append(f"| **{entry['model']}** | {said} |" + " |" * (6 if corrupted else 3))
        for method in found["methods"]:
            rows = {row["condition"]: row for row in entry["scores"] if row["method"] == method}
            cells = [_cells([rows["clean"]]), *([_cells([rows[one] for one in corrupted])] if corrupted else [])]
            lines.append(f"| | {method} | {' | '.join(cells)} |")
    failed = {f"{entry['model']}, {row['method']}: {row['failed']}" for entry in found["models"]
              for row in entry["scores"] if row["failed"]}
    return "\n".join([*lines, *([""] if failed else []), *sorted(failed)])


def _cells(rows: Sequence[dict[str, Any]]) -> str:
    def mean(key: str, scale: float, form: str) -> str:
        values = [row[key] for row in rows if row[key] is not None]
        return format(scale * float(np.mean(values)), form) if values else "-"

    return " | ".join((mean("pointing", 100, ".0f"), mean("deletion", 1, ".2f"), mean("insertion", 1, ".2f")))
