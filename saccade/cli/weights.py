"""`saccade weights list | get | import | check`: trained weights."""

from __future__ import annotations

import getpass
import hashlib
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console

import saccade
from saccade.cli.shared import Json, app, console, megabytes, print_json, table
from saccade.core import weights as store
from saccade.core.card import Weights
from saccade.core.download import cache_folder
from saccade.core.errors import SaccadeError
from saccade.core.files import sha256_of
from saccade.core.index import is_backbone, resolve_model
from saccade.core.names import closest, matching

commands = typer.Typer(help="Trained weights: which exist, get them, check them.", no_args_is_help=True)
app.add_typer(commands, name="weights")


@commands.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell pattern of model names.")] = "*",
    as_json: Json = False,
) -> None:
    """The trained weights that the cards know, and which of them are on this machine."""
    names = matching(store.list_weights(), pattern)
    if as_json:
        print_json({name: {**vars(store.published(name)), "status": store.status(name)} for name in names})
        return
    shown = table("model", "training data", "px", "top-1", "licence", "status", "here", "from")
    for name in names:
        weights = store.published(name)
        shown.add_row(name, weights.data, str(weights.img_size), str(weights.top1 or ""), weights.licence,
                      store.status(name), "yes" if store.cached_file(name) else "", _origin(weights.source))
    console.print(shown)
    if not names:
        console.print(f"no model with weights matches {pattern!r}")


@commands.command()
def get(names: Annotated[list[str], typer.Argument(help="Models, or shell patterns.")]) -> None:
    """Download weights to the cache; what was cut off goes on, what is there is checked."""
    wanted = [name for pattern in names for name in _named(pattern)]
    for name in wanted:
        path = store.weights_file(name)
        console.print(f"{name}: {path} ({megabytes(path.stat().st_size)}, sha256 {sha256_of(path)})", markup=False)


@commands.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint that you downloaded.")],
    model: Annotated[str | None, typer.Option(help="Whose weights they are, if its name does not say.")] = None,
) -> None:
    """Take a downloaded file as a model's weights, after it was checked that it loads."""
    name, path = store.import_weights(file, model)
    console.print(f"{name}: {path} (sha256 {sha256_of(path)})", markup=False)


@commands.command()
def check(
    name: Annotated[str, typer.Argument(help="A model with weights.")],
    data: Annotated[Path, typer.Option(help="ImageNet's val: a folder with one sub-folder per class.")],
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    who: Annotated[str | None, typer.Option(help="Who measures, for the card; else the user's name.")] = None,
    as_json: Json = False,
) -> None:
    """Top-1 of a model's weights on pictures, as its authors evaluate it, and the line for its card."""
    from saccade.learn.imagenet import validate
    from saccade.tools.watch import Watch

    name, path = resolve_model(name), store.weights_file(name)
    if not is_backbone(name):
        raise SaccadeError(f"{name} is no classifier: there is no top-1 to check")
    weights = store.published(name)
    weights = replace(weights, source=store.pinned(weights.source), sha256=sha256_of(path), bytes=path.stat().st_size)
    model = saccade.create_model(name, pretrained=True)
    resume = cache_folder() / f"check-{hashlib.sha256(f'{data.resolve()} {weights}'.encode()).hexdigest()[:16]}.json"
    with Watch(Console(stderr=True)).bar(f"checking {name}", 1) as bar:
        found = validate(model, data, weights, batch_size=batch_size, resume=resume,
                         progress=lambda done, total: bar.at(done / total, f"{done} of {total} pictures"))
    said = f"{who or getpass.getuser()}, {date.today().isoformat()}, {found.top1:.2f}"
    line = f'"{name}": {_card_line(replace(weights, reproduced=said))}'
    if as_json:
        print_json({"model": name, **found._asdict(), "claimed": weights.top1, "sha256": weights.sha256, "card": line})
        return
    claimed = f" (claimed: {weights.top1})" if weights.top1 else ""
    console.print(f"{name}: top-1 {found.top1:.2f}{claimed}, top-5 {found.top5:.2f} on {found.images} pictures")
    console.print(line, markup=False)


def _origin(source: str) -> str:
    """Whose server; `saccade info` shows the whole address."""
    return urlsplit(source).hostname or source.partition(":")[0]


def _card_line(weights: Weights) -> str:
    """How a card writes the weights: what is not the default."""
    own = [field for field in fields(weights) if getattr(weights, field.name) != field.default]
    source, *rest = [getattr(weights, field.name) for field in own]
    return f"Weights({', '.join([repr(source), *(f'{field.name}={value!r}' for field, value in zip(own[1:], rest))])})"


def _named(pattern: str) -> list[str]:
    """The models with weights that a pattern or a name picks."""
    known = store.list_weights()
    found = matching(known, pattern) if any(sign in pattern for sign in "*?[") else [resolve_model(pattern)]
    if not found:
        raise SaccadeError(f"no model with weights matches {pattern!r}{closest(pattern, known)}")
    return found
