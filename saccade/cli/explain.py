"""`saccade explain`, `trust`: what a classifier looked at, and which explanations of which models to believe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from saccade.cli.shared import Data, Json, Strict, app, listed, print_json


@app.command()
def explain(
    pictures: Annotated[list[Path], typer.Argument(help="Image files, a tab each.")],
    model: Annotated[str, typer.Option(
        help="A registered model, a folder of `saccade train`, timm:NAME, torchvision:NAME or hf:FOLDER_OR_ID.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights: a file.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The published weights (downloaded).")] = False,
    method: Annotated[str, typer.Option(help="Attribution methods with commas between, or all.")] = "all",
    target: Annotated[str | None, typer.Option(help="The class to explain, by name or number; else the first.")] = None,
    apply: Annotated[str | None, typer.Option(help="A method that drops tokens, as in evit:keep=0.7.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also what each head does and matters.")] = False,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explain.html"),
) -> None:
    """Why a classifier said so: one page with maps, attention, and how far to trust them."""
    from rich.console import Console

    from saccade.tools.explain import Question, write_page
    from saccade.tools.watch import Watch

    watch = Watch(Console(stderr=True))
    question = Question(pictures, model, checkpoint, pretrained,
                        listed(method), target, apply, heads,
                        f"saccade {shlex.join(sys.argv[1:])}")
    with watch.bar("explaining", 1) as bar:
        def show(text: str, done: int, total: int) -> None:
            bar.at(done / total, text)
        answer = write_page(question, out, show)
    for entry in answer["pictures"]:
        said = entry["target"]
        print(f"{entry['name']}: {said['name']}, {said['probability']:.1%}; "
              f"{sum(not one['failed'] for one in entry['maps'])} maps")
    print(out)


@app.command()
def trust(
    data: Data,
    models: Annotated[str, typer.Option(
        help="Folders of `saccade train`, names, timm:NAME, torchvision:NAME or hf:NAME, with commas between.")],
    methods: Annotated[str, typer.Option(help="Attribution methods with commas between; nine, or all.")] = "",
    corruptions: Annotated[str, typer.Option(
        help="What the pictures also undergo; of noise, shot, impulse, blur, brightness, contrast, pixelate, jpeg."
    )] = "noise,blur,contrast,jpeg",
    strength: Annotated[int, typer.Option(help="Of the corruptions, 1 to 5.")] = 3,
    pictures: Annotated[int, typer.Option(help="Test pictures that are explained.")] = 16,
    boxes: Annotated[Path | None, typer.Option(
        help="Where the objects are, for the pointing game: a CSV of path, left, top, right, bottom.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The published weights (downloaded).")] = False,
    as_json: Json = False,
    strict: Strict = False,
) -> None:
    """How well which method explains which model: pointing game, deletion and insertion, clean and corrupted."""
    from rich.console import Console

    from saccade.papers.explainable_robust import NINE
    from saccade.tools.trust_table import Trial, judge, table
    from saccade.tools.watch import Watch

    trial = Trial(data, listed(models), listed(methods) or NINE, listed(corruptions), strength, pictures, boxes,
                  pretrained, strict)
    with Watch(Console(stderr=True)).bar("explaining", 1) as bar:
        def show(text: str, done: int, total: int) -> None:
            bar.at(done / total, text)
        found = judge(trial, show)
    if as_json:
        print_json(found)
    else:
        print(table(found))
