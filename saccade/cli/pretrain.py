"""`saccade pretrain`, `probe`: backbones that learn without labels, and what they have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saccade.cli.shared import Data, Devices, Json, Nodes, Strategy, Strict, app, console, listed, print_json, table


@app.command()
def pretrain(
    data: Annotated[str, typer.Argument(
        help="A folder of pictures, scenes or volumes, a CSV, or the built-in tiles, planted or digits.")],
    method: Annotated[
        str, typer.Option(help="How to learn, as in mae, or with options, mae:ratio=0.6,depth=4.")
    ],
    model: Annotated[str, typer.Option(help="Registered model.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, curves and settings; the same command resumes.")],
    epochs: Annotated[int, typer.Option()] = 100,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Pictures a step, over all processes.")] = 64,
    img_size: Annotated[int, typer.Option(help="Side of the square pictures, pixels.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts that a process works through before each step.")] = 1,
    average: Annotated[float, typer.Option(help="Of the moving average of the weights; 0: none.")] = 0.0,
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    strict: Strict = False,
) -> None:
    """Train one model on pictures without labels."""
    from saccade.core.apply import parse_method
    from saccade.core.pretraining import KIND
    from saccade.learn import pretrained
    from saccade.learn.loop import Machines, first_process
    from saccade.learn.pretrain import Recipe
    from saccade.tools.watch import Watch

    watch = Watch()
    name, options = parse_method(method, KIND)
    recipe = Recipe(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, img_size=img_size, seed=seed,
                    accumulate=accumulate, average=average, precision=precision, flip=data != "digits")
    machines = Machines(devices, nodes, strategy)
    with watch.epochs("pre-training", model, epochs) as show:
        found, notes = pretrained.pretrain(data, model, name, out, recipe, options=options, strict=strict,
                                           machines=machines, progress=show)
    if not first_process():
        return
    for note in notes:
        watch.line(f"note: {note}")
    last = {name: values[-1] for name, values in found.curves.items()}
    watch.line(f"{model} by {method}: loss {last['train_loss']:.3f}, features of effective rank "
               f"{last['effective_rank']:.1f} and standard deviation {last['feature_std']:.2g}; in {out}")


@app.command()
def probe(
    data: Data,
    checkpoint: Annotated[Path, typer.Option(help="A folder that `saccade pretrain` made, or a file of weights.")],
    model: Annotated[str | None, typer.Option(help="Registered model, where the checkpoint does not say.")] = None,
    pooling: Annotated[str, typer.Option(help="Attentive probes too, with commas between, as in efficient,aim.")] = "",
    img_size: Annotated[int, typer.Option(help="Side in pixels, where the checkpoint does not say.")] = 32,
    epochs: Annotated[int, typer.Option(help="Of an attentive probe.")] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
    strict: Strict = False,
) -> None:
    """How well simple classifiers do on the frozen features of a model."""
    from saccade.learn import pretrained

    opened = pretrained.open_pretrained(checkpoint, model, img_size)
    found = pretrained.probed(data, opened, listed(pooling), epochs=epochs, seed=seed, strict=strict)
    if as_json:
        print_json(found)
        return
    shown = table("probe", "accuracy", "balanced accuracy", "macro F1")
    for by, scores in found.items():
        shown.add_row(by, *(f"{value:.1%}" for value in scores.values()))
    console.print(shown)
