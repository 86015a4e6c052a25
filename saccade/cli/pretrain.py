"""`saccade pretrain` and `saccade probe`: learning from pictures without labels, and what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saccade.cli.shared import (
    Accumulate,
    Average,
    Data,
    Json,
    Machines,
    Precision,
    Processes,
    Strategy,
    Strict,
    app,
    console,
    options_of,
    print_json,
)
from saccade.core.errors import SaccadeError


@app.command()
def pretrain(
    data: Annotated[str, typer.Argument(help="A folder of pictures at any depth, a CSV, or tiles or digits.")],
    model: Annotated[str, typer.Option(help="Registered backbone, or timm:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, curves and settings; the same command resumes.")],
    method: Annotated[str, typer.Option(help="As in mae, or with options, mae:ratio=0.6,depth=4.")] = "mae",
    epochs: Annotated[int, typer.Option()] = 100,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Of all processes together.")] = 64,
    img_size: Annotated[int, typer.Option(help="Side of the square pictures, pixels.")] = 32,
    flip: Annotated[bool, typer.Option(help="Crops may be mirrored: not for digits or writing.")] = True,
    average: Average = 0.0,
    accumulate: Accumulate = 1,
    precision: Precision = "32-true",
    devices: Processes = 1,
    nodes: Machines = 1,
    strategy: Strategy = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    strict: Strict = False,
) -> None:
    """Train a backbone on pictures without labels."""
    from saccade.learn.data import open_pictures
    from saccade.learn.epochs import Devices
    from saccade.learn.pretrain import Pretraining
    from saccade.learn.pretrain import pretrain as run
    from saccade.tools.watch import Watch

    name, options = options_of(method)
    recipe = Pretraining(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, img_size=img_size, seed=seed, flip=flip,
        average=average, accumulate=accumulate, precision=precision, method=name, options=options)
    pictures, watch = open_pictures(data, strict=strict), Watch()
    with watch.bar(f"{name} of {model}", epochs) as bar:
        def show(epoch: int, step: int, steps: int, loss: float) -> None:
            bar.at(epoch - 1 + step / steps, f"{name} of {model}, epoch {epoch}/{epochs}, loss {loss:.3f}")
        curves = run(pictures, model, recipe, out, devices=Devices(devices, nodes, strategy), say=show)
    for note in pictures.notes:
        watch.line(f"note: {note}")
    last = {key: values[-1] for key, values in curves.items()}
    watch.line(f"{model} by {name}: loss {last['loss']:.4f}, features of spread {last['spread']:.3f} and effective "
               f"rank {last['rank']:.1f}; in {out}")


@app.command()
def probe(
    data: Data,
    checkpoint: Annotated[Path, typer.Option(help="A folder that `saccade pretrain` or `train` made, or weights.")],
    model: Annotated[str | None, typer.Option(help="Registered model, where the weights are a file.")] = None,
    pooling: Annotated[str, typer.Option(help="linear, knn, efficient, simpool, ..., with commas between.")] =
        "linear,knn",
    img_size: Annotated[int, typer.Option(help="Side of the square pictures, pixels; 0: as it was trained.")] = 0,
    as_json: Json = False,
    strict: Strict = False,
) -> None:
    """What a frozen backbone's features are worth: the accuracy of simple heads on them."""
    from saccade.learn.attentive import probes
    from saccade.learn.data import open_images
    from saccade.learn.pretrain import Encoder, opened

    encoder: Encoder = opened(checkpoint, model, img_size)
    images = open_images(data, strict=strict)
    names = tuple(name.strip() for name in pooling.split(",") if name.strip())
    with console.status("probing"):
        found = probes(encoder.model, images, names, img_size=encoder.img_size, mean=encoder.mean, std=encoder.std)
    right: dict[str, Any] = {}
    for name, chances in found.items():
        hits = sum(int(guess) == label for guess, label in zip(chances.argmax(1), images.test.labels, strict=True))
        right[name] = hits / len(images.test)
    if as_json:
        print_json(right)
        return
    for name, share in right.items():
        console.print(f"{name}: {share:.1%} of {len(images.test)} test pictures")
    if not right:
        raise SaccadeError(f"--pooling {pooling!r} names no probe")
