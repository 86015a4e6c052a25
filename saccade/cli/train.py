"""`saccade train`: one model on one's own pictures, a classifier or a network that restores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saccade.cli.shared import Devices, Nodes, Strategy, Strict, app, listed
from saccade.core.errors import SaccadeError

CLASSIFIERS, RESTORERS = "Options of classifiers", "Options of networks that restore"


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        str, typer.Argument(help="A folder with a sub-folder per class, a CSV, or the built-in tiles or digits; where "
                                 "the model restores, a folder of good pictures.")
    ],
    model: Annotated[str, typer.Option(help="Registered model.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, metrics and settings; the same command resumes.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from these weights, a file or a folder (a classifier's head anew).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="20; 10 where the model restores.")] = None,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step, 64; 8 patches where it restores.")] = None,
    img_size: Annotated[
        int, typer.Option(help="Side of the square pictures, pixels.", rich_help_panel=CLASSIFIERS)
    ] = 32,
    drop_path_rate: Annotated[float, typer.Option(rich_help_panel=CLASSIFIERS)] = 0.0,
    degradation: Annotated[
        str, typer.Option(help="What to undo: x2, x3, x4 (as the model enlarges, by default), noise25, noise0-50, "
                               "jpeg40, jpeg10-90, rain, haze.", rich_help_panel=RESTORERS)
    ] = "",
    degraded: Annotated[
        Path | None, typer.Option(help="Instead, a folder with the degraded picture of each name.",
                                  rich_help_panel=RESTORERS)
    ] = None,
    patch: Annotated[
        str, typer.Option(help="Side of the patches that it sees, pixels; several, as in 48,64,96, let them grow.",
                          rich_help_panel=RESTORERS)
    ] = "48",
    steps: Annotated[int, typer.Option(help="Steps an epoch.", rich_help_panel=RESTORERS)] = 200,
    loss: Annotated[
        str, typer.Option(help="l1, charbonnier, fft, or a sum of them, as in charbonnier=1,fft=0.05.",
                          rich_help_panel=RESTORERS)
    ] = "l1",
    average: Annotated[
        float, typer.Option(help="Of the moving average of the weights.", rich_help_panel=RESTORERS)
    ] = 0.999,
    devices: Devices = 1,
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    strict: Strict = False,
) -> None:
    """Train one model on a set of images: a classifier, or a network that restores pictures."""
    from saccade.learn import runs
    from saccade.learn.loop import Machines, first_process
    from saccade.learn.restoration import runs as restoration
    from saccade.learn.restoration import train as restorers
    from saccade.learn.train import Recipe
    from saccade.tools.products import ship_run
    from saccade.tools.ship import FOLDER
    from saccade.tools.watch import Watch

    restores, watch = restoration.restores(model), Watch()
    _refuse(context, CLASSIFIERS if restores else RESTORERS, model)
    common: dict[str, Any] = dict(learning_rate=learning_rate, seed=seed)
    common |= {name: value for name, value in (("epochs", epochs), ("batch_size", batch_size)) if value is not None}
    shared: dict[str, Any] = dict(checkpoint=checkpoint, strict=strict, machines=Machines(devices, nodes, strategy))

    if restores:
        if degraded is not None and degradation:
            raise SaccadeError(f"--degradation {degradation} and --degraded {degraded}: give one of the two")
        patches = restorers.Recipe(steps=steps, patches=_sides(patch), losses=_losses(loss), average=average, **common)
        with watch.epochs("training", model, patches.epochs) as show:
            found = restoration.train(Path(data), model, out, patches, how=degraded or degradation, progress=show,
                                      **shared)
        notes, before, after = found["data"]["notes"], found["before"], found["after"]
        reached = (f"PSNR {after['psnr_y']:.2f} dB on Y and {after['psnr_rgb']:.2f} dB on RGB where they were "
                   f"{before['psnr_y']:.2f} and {before['psnr_rgb']:.2f}, SSIM {after['ssim_y']:.4f} where it was "
                   f"{before['ssim_y']:.4f}")
    else:
        squares = Recipe(img_size=img_size, drop_path_rate=drop_path_rate, **common)
        with watch.epochs("training", model, squares.epochs) as show:
            trained = runs.train(data, model, out, squares, progress=show, **shared)
        notes = trained.images.notes
        val, test = (trained.metrics[part]["accuracy"] for part in ("val", "test"))
        reached = f"validation {val:.1%}, test {test:.1%}"
    if not first_process():
        return
    for note in notes:
        watch.line(f"note: {note}")
    watch.line(f"{model}: {reached}; in {out}")
    if not restores:
        with watch.waiting("shipping it"):
            shipped = ship_run(trained, squares, out)
        for line in shipped.lines(out / FOLDER):
            watch.line(line)


def _refuse(context: typer.Context, panel: str, model: str) -> None:
    """Raise SaccadeError for an option that was given and is of the other kind of model."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE" and getattr(option, "rich_help_panel", None) == panel:
            kind = "classifies" if panel == RESTORERS else "restores"
            raise SaccadeError(f"{option.opts[0]} means nothing to {model}, which {kind}: leave it out")


def _sides(text: str) -> tuple[int, ...]:
    if not listed(text) or not all(part.isdigit() for part in listed(text)):
        raise SaccadeError(f"--patch {text}: give a side in pixels, or several with commas between, as in 48,64,96")
    return tuple(map(int, listed(text)))


def _losses(text: str) -> dict[str, float]:
    try:
        return {name: float(weight or 1) for name, _, weight in (part.partition("=") for part in listed(text))}
    except ValueError as error:
        raise SaccadeError(f"--loss {text}: give names, or names and weights, as in charbonnier=1,fft=0.05") from error
