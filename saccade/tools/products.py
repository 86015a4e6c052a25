"""What a training and a contest hand over to be shipped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from saccade.core.apply import parse_method
from saccade.core.index import index, model_paper
from saccade.learn.data import ImageSet
from saccade.learn.probe import Probed
from saccade.learn.runs import Trained
from saccade.learn.train import Recipe
from saccade.tools.contestants import Contestant
from saccade.tools.report_figures import percent
from saccade.tools.ship import FOLDER, Product, Shipped, ship
from saccade.tools.standings import Standing
from saccade.tools.trials import Arena, best_seed

ONE = "One training: the intervals know the luck of the pictures, not that of training."

REFERENCES = {"narrow ResNet": "narrow ResNet: ResNet-18 at a quarter of its width, with a 3x3 stem"}


def ship_run(trained: Trained, recipe: Recipe, out: Path) -> Shipped:
    """`best/` in the folder of a training."""
    run = trained.run
    product = Product(
        name=run.name, model=run.model, paper=_described(run.name), classes=run.classes, img_size=run.img_size,
        code=f"model = {_call(run.name, {'num_classes': len(run.classes), 'img_size': run.img_size})}",
        origin=run.origin, data=_data(trained.images), metrics=trained.metrics["test_intervals"], caution=ONE,
        training=f"{_epochs(recipe.epochs)}, batch {recipe.batch_size}, learning rate {recipe.learning_rate:g}, "
                 f"{recipe.img_size} pixels, seed {recipe.seed}",
        mean=run.mean, std=run.std)
    return ship(product, out / FOLDER, trained.images.test)


def ship_winner(
    arena: Arena, standing: Standing, row: dict[str, Any], model: nn.Module | None, graph: Path | None = None
) -> Shipped:
    """`best/` in the folder of a contest: `model` of one who took part, with the weights of its best seed.

    `row` is its entry in the results, `graph` its ONNX file, where there is one. What is no network is not shipped, and
    what was there before goes.
    """
    entrant, images = standing.entrant, arena.images
    if model is None:
        shutil.rmtree(arena.out / FOLDER, ignore_errors=True)
        return Shipped(entrant.name, False,
                       missing=f"nothing is shipped: {entrant.name}, which is recommended, is no network")
    seed, rate = best_seed(standing.answers), row["learning_rate"]
    training = (f"{_epochs(arena.epochs)}, batch {arena.batch_size}, "
                + (f"learning rate {rate:g}, " if rate else "")  # what a method is applied to was trained as another
                + f"{arena.img_size} pixels, seed {seed}, start {arena.start}")
    caution = ONE
    if isinstance(model, Probed):
        training = f"a linear classifier on frozen features, {arena.img_size} pixels"
    elif arena.seeds > 1:
        own = next(one for one in row["seeds"] if one["seed"] == seed)
        caution = (f"Means over {arena.seeds} trainings. The weights here are those of seed {seed}, the best on "
                   f"validation: accuracy {percent(own['accuracy'])} on the test pictures.")
    host = entrant.host or entrant
    product = Product(
        name=entrant.name, model=model, code=_code(arena, entrant, model), classes=images.classes,
        paper=_described(host.registered["model"]) if host.registered else REFERENCES.get(host.name, host.name),
        img_size=arena.img_size,
        origin=entrant.begins(arena.start), data=_data(images), training=training, metrics=row["metrics"],
        caution=caution)
    return ship(product, arena.out / FOLDER, images.test, graph)


def _code(arena: Arena, entrant: Contestant, model: nn.Module) -> str:
    """The lines of Python that build a contestant's network."""
    host, classes, side = entrant.host or entrant, len(arena.images.classes), arena.img_size
    if isinstance(model, Probed):
        classes = 0
    if host.registered is not None:
        lines = [f"model = {_call(host.registered['model'], {'num_classes': classes, **host.registered['options']})}"]
    elif host.kind == "reference":
        lines = ["from saccade.tools.contestants import references", "",
                 f"model = references({side}, {arena.start!r})[2].build({classes}, False)"]
    else:
        lines = ["from saccade.tools.contestants import contestants", "",
                 f"model = contestants(({host.name!r},), (), {side})[0].build({classes}, False)"]
    if entrant.method is not None:
        name, options = parse_method(entrant.method)
        lines.append(_call(name, options, "saccade.apply(model, "))
    if isinstance(model, Probed):
        lines = ["import torch", "from saccade.learn.probe import Probed", *lines,
                 f"model = Probed(model, torch.nn.Linear({model.head.in_features}, {model.head.out_features}))"]
    return "\n".join(lines)


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


def _call(name: str, options: Mapping[str, Any], function: str = "saccade.create_model(") -> str:
    return f"{function}{', '.join([repr(name), *(f'{key}={value!r}' for key, value in options.items())])})"


def _described(name: str) -> str:
    """One of our models by its paper, in Markdown."""
    card = index()["papers"][model_paper(name)]
    title = f"[{card['title']}](https://arxiv.org/abs/{card['arxiv']})" if card["arxiv"] else card["title"]
    return f"{name}: {title}, {card['authors']}, {card['year']}"


def _data(images: ImageSet) -> dict[str, Any]:
    counts = {part: len(getattr(images, part)) for part in ("train", "val", "test")}
    return {"name": images.name, "counts": counts, "notes": images.notes, "fingerprint": images.fingerprint}
