"""`saccade restore`, `verify`, `export`, `bench`: what is done with models that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import saccade
from saccade.cli.shared import Json, app, console, listed, print_json, table
from saccade.core.errors import SaccadeError


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="A picture (PNG, JPEG, WebP, TIFF), or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write; the same command resumes a folder.")],
    checkpoint: Annotated[
        Path, typer.Option(help="Weights: a folder that `saccade train` made, the authors' file, or ours.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Registered model of restoration, as in hat_x4, where no folder says it.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Side of the squares that the network sees, pixels.")] = 256,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring squares share.")] = 32,
    self_ensemble: Annotated[bool, typer.Option("--self-ensemble", help="Mean over its eight turns.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Enlarge or clean pictures, of any size; depth, alpha, EXIF and colour profile are kept."""
    from saccade.learn.restoration.restore import Tiles
    from saccade.tools.restore import Restoration
    from saccade.tools.restore import restore as run
    from saccade.tools.watch import Watch

    run(Restoration(source, target, model, checkpoint, Tiles(tile, overlap, self_ensemble), force), Watch())


@app.command()
def verify(
    goldens: Annotated[list[Path], typer.Argument(help="Goldens (JSON): of our whole models, or what --port answers.")],
    port: Annotated[
        str, typer.Option(help="Test this instead: module:function or file.py:function, called with the golden.")
    ] = "",
    keymap: Annotated[
        Path | None, typer.Option(help="The authors' names in the port (JSON): see docs/goldens.md.")
    ] = None,
    only: Annotated[str, typer.Option(help="What to compare, patterns with commas between, as in out,stage*.")] = "",
    as_json: Json = False,
) -> None:
    """Are our models, or anybody's port, equal to the authors'? Exit code 1 where one is not."""
    from saccade.golden import read_golden
    from saccade.tools import port as ports
    from saccade.tools.verify import Verdict
    from saccade.tools.verify import verify as check

    if keymap is not None and not port:
        raise SaccadeError("--keymap is of a port: give --port module:function too")
    build = ports.load_build(port) if port else None
    rules = None if keymap is None else ports.read_keymap(keymap)
    read = [ports.narrow(read_golden(path), listed(only)) for path in goldens]
    verdicts: list[Verdict] = []
    for golden in read:
        with console.status(f"verifying {golden['model']}"):
            verdicts += check(golden) if build is None else ports.verify_port(build, golden, rules)
    if as_json:
        print_json([{**vars(verdict), "passed": verdict.passed} for verdict in verdicts])
    else:
        shown = table("golden", "what", "error", "tolerance", "")
        for verdict in verdicts:
            mark = "[green]pass[/]" if verdict.passed else "[red]FAIL[/]"
            shown.add_row(verdict.golden, verdict.what, f"{verdict.error:.1e}", f"{verdict.tolerance:g}", mark)
        console.print(shown)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="A model's name, or a folder that `saccade train` made.")],
    onnx: Annotated[Path, typer.Option(help="The file to write.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for a model's name.")] = None,
    size: Annotated[int, typer.Option(help="Image side in pixels; 0: the model's own.")] = 0,
) -> None:
    """An ONNX file with free batch and image sizes, checked against onnxruntime at two sizes."""
    from saccade.learn.restoration.runs import opened
    from saccade.learn.runs import RESTORATION
    from saccade.tools.export import export_onnx

    if (Path(what) / RESTORATION).is_file():
        what, checkpoint = opened(Path(what), None)
    if Path(what).is_dir():
        from saccade.learn.runs import open_run

        run = open_run(Path(what))
        model, side = run.model, size or run.img_size
    else:
        from saccade.core.build import native_size

        model = saccade.create_model(what, checkpoint_path=checkpoint)
        side = size or native_size(what)
    with console.status(f"exporting {what}"):
        found = export_onnx(model, onnx, side)
    differences = ", ".join(f"{name} differs by {value:.0e}" for name, value in found.items())
    console.print(f"{onnx}: {differences}", markup=False)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Models.")] = None,
    against: Annotated[str | None, typer.Option(help="timm: race each against timm's with the same weights.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8",
    size: Annotated[int, typer.Option(help="Image side, pixels.")] = 224,
    threads: Annotated[int, typer.Option()] = 1,
    rounds: Annotated[int, typer.Option(help="Alternating rounds; the median counts.")] = 15,
    mixers: Annotated[str, typer.Option(help="Token mixers instead, with commas between, or all.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens for them, rising.")] = "196,784,3136,12544",
    out: Annotated[Path | None, typer.Option(help="A page with their plot.")] = None,
    as_json: Json = False,
) -> None:
    """Time and peak memory of models, alternating within one process; or of mixers, against the number of tokens."""
    from saccade.tools import bench as tool
    from saccade.tools.watch import Watch

    if bool(names) == bool(mixers) or (out is not None and not mixers):
        raise SaccadeError("give names of models, or --mixers (all, or some with commas between); --out is of mixers")
    watch = Watch(Console(stderr=True))
    if mixers:
        _bench_mixers(mixers, numbers("--tokens", tokens), threads, rounds, out, as_json, watch)
        return
    with watch.bar("measuring", rounds) as bar:
        def show(text: str, done: int, total: int) -> None:
            bar.at(done * rounds / total, text)
        rows = tool.bench(names or [], against=against, batch=numbers("--batch", batch), size=size,
                          threads=threads, rounds=rounds, progress=show)
    if as_json:
        print_json(rows)
    else:
        console.print(tool.table(rows))


def numbers(option: str, text: str) -> list[int]:
    """Numbers with commas between."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise SaccadeError(f"{option} {text}: give numbers with commas between, as in 1,8")
    return [int(part) for part in text.split(",")]


def _bench_mixers(
    mixers: str, tokens: list[int], threads: int, rounds: int, out: Path | None, as_json: bool, watch: Any
) -> None:
    from saccade.tools import lengths as tool

    with watch.bar("measuring", 1) as bar:
        def show(text: str, done: int, total: int) -> None:
            bar.at(done / total, text)
        rows = tool.lengths(listed(mixers), tokens, threads=threads, rounds=rounds, progress=show)
    if out is not None:
        tool.plot(rows, out)
    if as_json:
        print_json(rows)
    else:
        console.print(tool.table(rows, tokens))
