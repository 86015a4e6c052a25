"""`saccade compare`, `eval`, `predict`: classifiers on one's own pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saccade.cli.shared import Data, Json, Strict, app, console, listed, print_json


@app.command()
def compare(
    data: Data = "tiles",
    models: Annotated[
        str | None, typer.Option(help="Names, timm:NAME or file.py:function, with commas between; five narrow ones.")
    ] = None,
    img_size: Annotated[int, typer.Option(help="Side of the square pictures, pixels.")] = 32,
    epochs: Annotated[int | None, typer.Option(help="Epochs for each.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time for all, as in 90s, 10m, 1h, instead of epochs.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each contestant.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for results, report and weights.")] = None,
    mixers: Annotated[str, typer.Option(help="Every model also with each of these mixers, with commas between.")] = "",
    start: Annotated[str | None, typer.Option(help="scratch, finetune or probe.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    apply: Annotated[
        str, typer.Option(help="Methods that every model is also shown with, as in evit:keep=0.7,evit:keep=0.5.")
    ] = "",
    checkpoint: Annotated[
        str, typer.Option(help="Pre-trainings of a model to compare, as in mae=FOLDER,rotnet=FOLDER.")
    ] = "",
    strict: Strict = False,
) -> None:
    """Which of several models is best for a set of images, at which cost."""
    from saccade.core.apply import split_methods
    from saccade.tools.compare import Contest
    from saccade.tools.compare import compare as run

    if models is None:
        models = "" if checkpoint else "swin_nano,convnext_nano,nat_nano,biformer_nano,deit_nano"
    run(Contest(data=data, models=listed(models), img_size=img_size, epochs=epochs, budget=budget, seeds=seeds, out=out,
                mixers=listed(mixers), start=start, strict=strict, batch_size=batch_size, apply=split_methods(apply),
                checkpoint=listed(checkpoint)))


@app.command("eval")
def evaluate(
    data: Data,
    checkpoint: Annotated[Path, typer.Option(help="A folder that `saccade train` made.")],
    part: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    as_json: Json = False,
    strict: Strict = False,
) -> None:
    """Accuracy, balanced accuracy and macro-F1 of a trained model."""
    from saccade.learn import runs

    found = runs.evaluate(checkpoint, data, part, strict=strict)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {value:.1%}")


@app.command()
def predict(
    pictures: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="A folder that `saccade train` made.")],
    top: Annotated[int, typer.Option(help="Classes to show.")] = 5,
    as_json: Json = False,
) -> None:
    """Classes of pictures, with probabilities."""
    from saccade.learn import runs

    found = runs.predict(checkpoint, pictures, top)
    if as_json:
        print_json(found)
        return
    for entry in found:
        ranked = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in entry["classes"])
        console.print(f"{entry['path']}: {ranked}", markup=False)
