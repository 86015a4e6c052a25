"""A run: one model trained to a folder, and what can be done with such a folder.

The folder holds model.json (name, options, classes, preprocessing), weights.safetensors, metrics.json, curves.json and
recipe.json; `saccade eval`, `predict` and `export` take it wherever they take a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.load import load
from saccade.core.origin import Origin, of_file
from saccade.learn.data import ImageSet, Split, open_images
from saccade.learn.loop import Machines, Progress, first_process
from saccade.learn.pictures import read_image
from saccade.learn.score import intervals, metrics
from saccade.learn.train import Recipe, fit, predict_logits
from saccade.learn.transforms import evaluation_transform, normalise

CARD, PRETRAINING, WEIGHTS = "model.json", "pretraining.json", "weights.safetensors"
RESTORATION = "restoration.json"  # the card of a network that restores pictures
UNSAID = Origin("an earlier run that does not say what it began with", licence="unknown")


@dataclass(frozen=True)
class Run:
    """A trained model with what it takes to use it."""

    model: nn.Module
    name: str
    classes: list[str]
    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    origin: Origin


@dataclass(frozen=True)
class Trained:
    """What `train` did: the run, the images that it saw and what metrics.json holds."""

    run: Run
    images: ImageSet
    metrics: dict[str, Any]


def train(
    data: str,
    name: str,
    out: Path,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    fresh: Sequence[str] = ("head*",),
    strict: bool = False,
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a registered model on a set of images; the same call on the same folder resumes.

    From a checkpoint (a file, or the folder of a run or a pre-training) everything but the head is loaded (`fresh` says
    otherwise).
    """
    images = open_images(data, seed=0, strict=strict)
    options: dict[str, Any] = {
        "num_classes": len(images.classes), "img_size": recipe.img_size, "drop_path_rate": recipe.drop_path_rate,
    }

    def make() -> nn.Module:
        if checkpoint is None:
            return create_model(name, **options)
        return create_model(name, checkpoint_path=weights_file(checkpoint), fresh=fresh, **options)

    make()  # a wrong name or checkpoint is told before anything is written
    fitted = fit(make, images, recipe, writable(out), machines=machines, progress=progress)
    origin = origin_of(checkpoint)
    card = {"model": name, "options": options, "classes": images.classes, "mean": recipe.mean, "std": recipe.std,
            "origin": vars(origin)}
    if first_process():
        write_whole(out / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    run = Run(fitted.model, name, images.classes, recipe.img_size, recipe.mean, recipe.std, origin)
    predicted, truth, number = _predicted(run, images.test), np.asarray(images.test.labels), len(images.classes)
    spans = {name: span.as_dict() for name, span in intervals(predicted[None], truth, number).items()}
    found = {"val": _scores(run, images.val), "test": metrics(predicted, truth, number), "test_intervals": spans,
             "training_seconds": fitted.seconds,
             "data": {"name": images.name, "fingerprint": images.fingerprint, "notes": images.notes}}
    if first_process():
        write_whole(out / "metrics.json", json.dumps(found, indent=1, ensure_ascii=False))
    return Trained(run, images, found)


def origin_of(checkpoint: Path | None) -> Origin:
    """Where the weights come from that a training begins with: those of a run began somewhere themselves."""
    if checkpoint is None:
        return Origin()
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if weights_file(folder) == weights_file(checkpoint):
        for card in (folder / CARD, folder / PRETRAINING):
            if card.exists():
                return _origin(json.loads(card.read_text(encoding="utf-8")))
    return of_file(weights_file(checkpoint))


def _origin(card: dict[str, Any]) -> Origin:
    return Origin(**card["origin"]) if "origin" in card else UNSAID


def weights_file(place: Path) -> Path:
    """The weights that a folder of a run or a pre-training holds; a file is its own."""
    return place / WEIGHTS if place.is_dir() else place


def open_run(folder: Path) -> Run:
    """The model of a run's folder, in evaluation mode; raises SaccadeError where the folder holds none."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        name, options, classes = card["model"], card["options"], card["classes"]
    except (OSError, ValueError, KeyError) as error:
        if (folder / RESTORATION).is_file():
            raise SaccadeError(f"{folder} holds a network that restores pictures: use `saccade restore --checkpoint "
                               f"{folder}`") from error
        raise SaccadeError(
            f"{folder} holds no finished run ({CARD} is missing or broken): `saccade train` makes one"
        ) from error
    model = create_model(name, **options)
    load(model, folder / WEIGHTS)
    return Run(model.eval(), name, classes, options["img_size"], tuple(card["mean"]), tuple(card["std"]),
               _origin(card))


def evaluate(folder: Path, data: str, part: str = "test", *, strict: bool = False) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro-F1 of a run on a part of a set of images with the same classes."""
    run, images = open_run(folder), open_images(data, seed=0, strict=strict)
    if images.classes != run.classes:
        raise SaccadeError(f"{data} has the classes {_some(images.classes)}, the run knows {_some(run.classes)}: "
                           "evaluate on a set with the same class names")
    return _scores(run, _part(images, part))


def predict(folder: Path, pictures: Sequence[Path], top: int = 5) -> list[dict[str, Any]]:
    """For each picture `{"path", "classes": [{"class", "probability"}, ...]}`, the most probable first."""
    run = open_run(folder)
    squares = []
    transform = evaluation_transform(run.img_size)
    for path in pictures:
        try:
            squares.append(transform(read_image(path)))
        except OSError as error:
            raise SaccadeError(
                f"{path} cannot be read as an image ({error}): give a PNG, JPEG, WebP or TIFF file"
            ) from error
    with torch.no_grad():
        chances = run.model(normalise(torch.stack(squares), run.mean, run.std)).softmax(-1)
    return [{"path": str(path), "classes": _ranked(chance, run.classes, top)}
            for path, chance in zip(pictures, chances, strict=True)]


def _ranked(chances: Tensor, classes: list[str], top: int) -> list[dict[str, Any]]:
    values, places = chances.topk(min(top, len(classes)))
    return [{"class": classes[place], "probability": value}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)]


def _scores(run: Run, split: Split) -> dict[str, float]:
    return metrics(_predicted(run, split), np.asarray(split.labels), len(run.classes))


def _predicted(run: Run, split: Split) -> NDArray[np.int64]:
    logits = predict_logits(run.model, split, img_size=run.img_size, mean=run.mean, std=run.std)
    return logits.argmax(-1).numpy()


def _part(images: ImageSet, part: str) -> Split:
    if part not in ("train", "val", "test"):
        raise SaccadeError(f"there is no part {part!r}: choose train, val or test")
    found: Split = getattr(images, part)
    return found


def writable(out: Path) -> Path:
    """The folder, made where it is missing; raises SaccadeError where nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SaccadeError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
