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
from saccade.learn.data import ImageSet, open_images, open_pictures
from saccade.learn.loop import Machines, Outcome, Progress, first_process
from saccade.learn.pretrain import Recipe, fit
from saccade.learn.probe import extract, probe
from saccade.learn.runs import PRETRAINING as CARD
from saccade.learn.runs import weights_file, writable
from saccade.learn.score import metrics
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
    """Train a registered model on pictures by a method; the same call resumes. Returns also notes on the pictures."""

    def make() -> nn.Module:
        model = create_model(name, num_classes=0, img_size=recipe.img_size)
        return pretraining(model, method, **options or {})

    make()  # a wrong name or a model that does not fit is told before anything is read or written
    images = open_pictures(data, strict=strict)
    found = fit(make, images.train, images.fingerprint, recipe, writable(out), machines=machines, progress=progress)
    if first_process():
        card = {"model": resolve_model(name), "method": method, "options": options or {}, "img_size": recipe.img_size,
                "mean": recipe.mean, "std": recipe.std, "data": images.name,
                "origin": vars(Origin(f"pre-training by {method}, from random weights", images.name))}
        write_whole(out / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    return found, images.notes


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

