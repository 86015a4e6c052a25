"""A pre-training: one backbone trained without labels to a folder, and what its features tell of labelled pictures.

The folder holds pretraining.json (model, method, preprocessing), weights.safetensors, curves.json and recipe.json; the
weights are an ordinary checkpoint of the model without its head.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.index import resolve_model
from saccade.core.origin import Origin
from saccade.core.pretraining import pretraining
from saccade.learn import train
from saccade.learn.builtin import BUILTIN
from saccade.learn.data import SUFFIXES, ImageSet, open_images, open_pictures
from saccade.learn.loop import Machines, Outcome, Progress, first_process
from saccade.learn.pretrain import Recipe, Unlabelled, fit, try_once
from saccade.learn.probe import extract, probe
from saccade.learn.runs import PRETRAINING as CARD
from saccade.learn.runs import weights_file, writable
from saccade.learn.scenes import Scenes, modality_folders, open_scenes
from saccade.learn.score import metrics
from saccade.learn.volumes import Volumes, open_volumes, volume_files
from saccade.papers.efficient_probing import POOLINGS, Probe


@dataclass(frozen=True)
class Pretrained:
    """Weights of a backbone with what it takes to look at pictures as it did."""

    name: str
    weights: Path
    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def model(self) -> nn.Module:
        """The backbone without a head, in evaluation mode."""
        return create_model(self.name, img_size=self.img_size, num_classes=0, checkpoint_path=self.weights).eval()


def pretrain(
    data: str,
    name: str,
    method: str,
    out: Path,
    recipe: Recipe,
    *,
    options: dict[str, Any] | None = None,
    strict: bool = False,
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Outcome, list[str]]:
    """Train a registered model by a method on a folder that it takes; the same call resumes.

    Returns also notes on what was read.
    """
    build: dict[str, Any] = {"num_classes": 0, "img_size": recipe.img_size}

    def make() -> nn.Module:
        return pretraining(create_model(name, **build), method, **options or {})

    takes = getattr(make(), "takes", ("pictures",))  # a wrong name or host is told before anything is read
    source = open_source(data, method, takes, strict)
    if isinstance(source, Scenes):
        build["modalities"] = source.modalities
    learned = Unlabelled(source.train) if isinstance(source, ImageSet) else source
    try_once(make(), learned, recipe)  # sizes that do not fit, before anything is written
    found = fit(make, learned, source.fingerprint, recipe, writable(out), machines=machines, progress=progress)
    if first_process():
        card = {"model": resolve_model(name), "method": method, "options": options or {}, "img_size": recipe.img_size,
                "mean": recipe.mean, "std": recipe.std, "data": source.name,
                "origin": vars(Origin(f"pre-training by {method}, from random weights", source.name))}
        write_whole(out / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    return found, source.notes


def open_source(data: str, method: str, takes: Sequence[str], strict: bool = False) -> ImageSet | Scenes | Volumes:
    """What DATA holds, of the kinds that a method takes: scenes of several modalities, volumes, else pictures.

    Raises SaccadeError where it holds another kind, or two kinds.
    """
    folder = Path(data).expanduser()
    if data in BUILTIN or not folder.is_dir():
        kind = "pictures"
    elif "scenes" in takes and modality_folders(folder):
        kind = "scenes"
    else:
        pictures = any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
        volumes = [] if pictures and "volumes" not in takes else volume_files(folder)
        if pictures and volumes:
            raise SaccadeError(f"{folder}: pictures and volumes ({volumes[0].name}); give a folder of either")
        kind = "volumes" if volumes and not pictures else "pictures"
        if kind == "volumes" and kind not in takes:
            raise SaccadeError(f"{volumes[0]}: a volume, and {method} learns this model from {' or '.join(takes)}; "
                               "uni4eye with uni4eye_vit_base_patch16 takes volumes")
    if kind not in takes:
        raise SaccadeError(f"{data}: pictures, and {method} learns this model from {' or '.join(takes)}; give NIfTI or "
                           ".npy files of volumes, or another model")
    openers: dict[str, Any] = {"pictures": open_pictures, "scenes": open_scenes, "volumes": open_volumes}
    opened: ImageSet | Scenes | Volumes = openers[kind](data, strict=strict)
    return opened


def open_pretrained(place: Path, name: str | None = None, img_size: int = 32) -> Pretrained:
    """The weights in a folder of `pretrain`, or in any checkpoint file of the model called `name`."""
    card: dict[str, Any] = {}
    if (place / CARD).exists():
        card = json.loads((place / CARD).read_text(encoding="utf-8"))
    elif name is None:
        raise SaccadeError(f"{place} does not say which model it belongs to ({CARD} is missing): give --model NAME")
    if not weights_file(place).is_file():
        raise SaccadeError(f"{place} holds no weights ({weights_file(place).name} is missing): `saccade pretrain` "
                           "makes them")
    return Pretrained(resolve_model(name or card["model"]), weights_file(place), card.get("img_size", img_size),
                      tuple(card.get("mean", Recipe.mean)), tuple(card.get("std", Recipe.std)))


def probed(
    data: str, pretrained: Pretrained, poolings: Sequence[str] = (), *, epochs: int = 20, seed: int = 0,
    strict: bool = False, progress: Callable[[Progress], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy, balanced accuracy and macro-F1 on the test pictures, by "linear", "knn" and each attentive pooling."""
    for pooling in poolings:
        if pooling not in POOLINGS:
            raise SaccadeError(f"there is no pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
    images, model = open_images(data, seed=0, strict=strict), pretrained.model()
    look: dict[str, Any] = dict(img_size=pretrained.img_size, mean=pretrained.mean, std=pretrained.std)
    features = [extract(model, split, **look) for split in (images.train, images.val, images.test)]
    known, held_out, truth = images.train.labels, images.val.labels, np.asarray(images.test.labels)
    answers = probe(features[0], known, features[1], held_out, features[2])
    recipe = train.Recipe(epochs=epochs, seed=seed, augment=False, label_smoothing=0.0, weight_decay=0.0, **look)
    for pooling in poolings:
        answers[pooling] = attentive(images, model, pooling, recipe, progress)
    return {by: metrics(answer.argmax(-1).numpy(), truth, len(images.classes)) for by, answer in answers.items()}


def attentive(
    images: ImageSet, model: nn.Module, pooling: str, recipe: train.Recipe,
    progress: Callable[[Progress], None] | None = None,
) -> Tensor:
    """(N, classes): what a probe by this pooling, trained on the tokens of the frozen model, says of the test part."""
    tokens = Tokens(model)
    with torch.no_grad():
        width = tokens(torch.zeros(1, 3, recipe.img_size, recipe.img_size,
                                   device=next(model.parameters()).device)).shape[-1]
    options = {option: _divisor(width, most) for option, most in (("heads", 12), ("queries", 32))
               if option in inspect.signature(POOLINGS[pooling]).parameters}

    def make() -> nn.Module:
        return Probe(tokens, width, len(images.classes), pooling, prefix=0, **options)

    with tempfile.TemporaryDirectory() as folder:
        fitted = train.fit(make, images, recipe, Path(folder), progress=progress)
    return train.predict_logits(fitted.model, images.test, img_size=recipe.img_size, mean=recipe.mean, std=recipe.std)


class Tokens(nn.Module):
    """image -> the last tokens (B, N, C) of a backbone on its grid, without those before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model.forward_features(image)  # type: ignore[operator]
        if found.ndim == 3:
            before = getattr(self.model, "prefix_count", getattr(self.model, "num_prefix_tokens", 0))  # ours, timm's
            return found[:, before:]
        return found.flatten(2).mT


def _divisor(width: int, most: int) -> int:
    """The largest divisor of `width` up to `most`."""
    return next(number for number in range(most, 0, -1) if width % number == 0)

