"""The command line: `saccade --help`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import saccade
from saccade.core.errors import SaccadeError
from saccade.core.index import index, is_backbone, list_mixers, list_models, paper_module, resolve_model

app = typer.Typer(
    help="Vision backbones and attention, checked against their authors' code.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[
    str, typer.Argument(help="A folder with a sub-folder per class, a CSV, or the built-in tiles or digits.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A broken image is an error instead of skipped.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        console.print(f"saccade {saccade.__version__}")
        raise typer.Exit


def _table(*columns: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, no_wrap=True)
    return shown


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, as in '*former*'.")] = "*",
    kind: Annotated[str, typer.Option(help="backbone or mixer.")] = "backbone",
    as_json: Json = False,
) -> None:
    """The registered models (or, by --kind, mixers)."""
    if kind not in ("backbone", "mixer"):
        raise SaccadeError(f"--kind {kind}: choose backbone or mixer")
    known = index()
    names = list_models(pattern) if kind == "backbone" else list_mixers(pattern)
    if as_json:
        _print_json(names)
        return
    shown = _table(kind, "paper", "params", "MACs", "top-1") if kind == "backbone" else _table(kind, "paper")
    for name in names:
        card = known["papers"][known["models" if kind == "backbone" else "mixers"][name]]
        numbers = [_millions(card["params"].get(name)), _giga(card["macs"].get(name)), str(card["top1"].get(name, ""))]
        shown.add_row(name, f"{card['title'][:60]} ({card['year']})", *(numbers if kind == "backbone" else ()))
    console.print(shown)
    if not names:
        console.print(f"no {kind} matches {pattern!r}")


def _millions(value: float | None) -> str:
    return f"{value / 1e6:.1f} M" if value else ""


def _giga(value: float | None) -> str:
    return f"{value / 1e9:.2f} G" if value else ""


@app.command()
def find(words: Annotated[list[str], typer.Argument(help="Words of a mechanism, title or author.")]) -> None:
    """Papers whose card speaks of all the words: `saccade find bi-level routing`."""
    papers = saccade.find(" ".join(words))
    if not papers:
        raise SaccadeError(f"no card speaks of {' '.join(words)!r}; `saccade list` shows all models")
    for paper in papers:
        card = index()["papers"][paper]
        console.print(f"[bold]{paper}[/]  {card['title']}, {card['year']}")
        console.print(f"  mixers: {', '.join(card['mixers']) or 'none'}; models: {', '.join(card['models'])}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A model, mixer or paper.")],
    size: Annotated[
        int, typer.Option(help="Image side in pixels, for shapes and multiply-adds; 0: the model's own.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Paper, shapes, parameters, multiply-adds, how it was verified and which checkpoints load."""
    card = saccade.info(name)
    known = index()
    facts: dict[str, Any] = {
        "paper": f"{card['title']}, {card['authors']}, {card['year']}", "arXiv": card["arxiv"], "code": card["code"],
        "licence of the authors' code": card["licence"], "written from": card["read"],
        "verified by": ", ".join([*card["goldens"], *card["tests"]]) or "nothing yet",
    }
    if name in known["mixers"]:
        facts |= {"mixer": f"{name} ({card['mixers'][name]})"}
    elif name in known["papers"] and name not in known["models"]:
        facts |= {"models": ", ".join(card["models"]), "mixers": ", ".join(card["mixers"])}
    else:
        facts |= _model_facts(resolve_model(name), card, size)
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        if value:
            console.print(f"[bold]{key}[/]: {value}")


def _model_facts(name: str, card: dict[str, Any], size: int) -> dict[str, Any]:
    import torch

    from saccade.core.build import accepted
    from saccade.core.features import FeatureInfo
    from saccade.core.load import key_maps
    from saccade.tools.measure import count_macs

    known, settings = accepted(name), paper_module(index()["models"][name]).SIZES[name]
    options: dict[str, Any] = {"img_size": size} if size and "img_size" in known else {}
    model = saccade.create_model(name, **options).eval()
    maps = FeatureInfo()
    if is_backbone(name):
        maps = saccade.create_model(name, features_only=True, **options).feature_info
    native = size or settings.get("img_size", 224)
    sides = (native, native) if isinstance(native, int) else tuple(native)
    macs = count_macs(model, (torch.zeros(1, settings.get("in_chans", 3), *sides),))
    weights = card["weights"].get(name)
    return {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
                      + (f" (paper: {_millions(card['params'][name])})" if name in card["params"] else ""),
        "multiply-adds": f"{macs / 1e9:.3f} G at {'x'.join(map(str, sides))}"
                         + (f" (paper: {_giga(card['macs'][name])})" if name in card["macs"] else ""),
        "maps": ", ".join(f"{channels} at 1/{stride}" for channels, stride in zip(maps.channels(), maps.reduction())),
        "checkpoints that load": ", ".join(key_maps(name)),
        "published weights": f"{weights['url']} ({weights['data']}, licence {weights['licence']})" if weights else "",
        "top-1 claimed": card["top1"].get(name, ""),
    }


@app.command()
def compare(
    data: Data = "tiles",
    models: Annotated[str, typer.Option(help="Names, timm:NAME or file.py:function, with commas between.")] =
        "swin_nano,convnext_nano,nat_nano,biformer_nano,deit_nano",
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
    strict: Strict = False,
) -> None:
    """Which of several models is best for a set of images, at which cost."""
    from saccade.tools.compare import Contest
    from saccade.tools.compare import compare as run

    run(Contest(data=data, models=_names(models), img_size=img_size, epochs=epochs, budget=budget, seeds=seeds, out=out,
                mixers=_names(mixers), start=start, strict=strict, batch_size=batch_size))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@app.command()
def train(
    data: Data,
    model: Annotated[str, typer.Option(help="Registered model.")],
    out: Annotated[Path, typer.Option(help="Folder for weights, metrics and settings; the same command resumes.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Start from these weights (the head anew).")] = None,
    epochs: Annotated[int, typer.Option()] = 20,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int, typer.Option()] = 64,
    img_size: Annotated[int, typer.Option(help="Side of the square pictures, pixels.")] = 32,
    drop_path_rate: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    strict: Strict = False,
) -> None:
    """Train one model on a set of images."""
    from saccade.learn import runs
    from saccade.learn.train import Progress, Recipe
    from saccade.tools.watch import Watch

    watch = Watch()
    recipe = Recipe(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, img_size=img_size, seed=seed,
                    drop_path_rate=drop_path_rate)
    with watch.bar(f"training {model}", epochs) as bar:
        def show(now: Progress) -> None:
            bar.at(now.epoch + now.step / now.steps, f"{model} epoch {now.epoch + 1}/{now.epochs}, loss {now.loss:.3f}")
        found = runs.train(data, model, out, recipe, checkpoint=checkpoint, strict=strict, progress=show)
    for note in found["data"]["notes"]:
        watch.line(f"note: {note}")
    watch.line(f"{model}: validation {found['val']['accuracy']:.1%}, test {found['test']['accuracy']:.1%}; in {out}")


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
        _print_json(found)
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
        _print_json(found)
        return
    for entry in found:
        ranked = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in entry["classes"])
        console.print(f"{entry['path']}: {ranked}", markup=False)


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="A picture (PNG, JPEG, WebP, TIFF), or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write; the same command resumes a folder.")],
    model: Annotated[str, typer.Option(help="Registered model of restoration, as in hat_x4.")],
    checkpoint: Annotated[Path, typer.Option(help="Its weights: the authors' file, or ours.")],
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
    goldens: Annotated[list[Path], typer.Argument(help="Goldens of whole models (JSON).")], as_json: Json = False
) -> None:
    """Are our models equal to their authors'? Exit code 1 where one is not."""
    from saccade.tools.verify import Verdict
    from saccade.tools.verify import verify as check

    verdicts: list[Verdict] = []
    for golden in goldens:
        with console.status(f"verifying {golden.stem}"):
            verdicts += check(golden)
    if as_json:
        _print_json([{**vars(verdict), "passed": verdict.passed} for verdict in verdicts])
    else:
        shown = _table("golden", "what", "error", "tolerance", "")
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
    from saccade.tools.export import export_onnx

    if Path(what).is_dir():
        from saccade.learn.runs import open_run

        run = open_run(Path(what))
        model, side = run.model, size or run.img_size
    else:
        model = saccade.create_model(what, checkpoint_path=checkpoint)
        settings = paper_module(index()["models"][resolve_model(what)]).SIZES[resolve_model(what)]
        side = size or settings.get("img_size", 224)
    with console.status(f"exporting {what}"):
        found = export_onnx(model, onnx, side)
    differences = ", ".join(f"{name} differs by {value:.0e}" for name, value in found.items())
    console.print(f"{onnx}: {differences}", markup=False)


@app.command()
def bench(
    names: Annotated[list[str], typer.Argument(help="Models.")],
    against: Annotated[str | None, typer.Option(help="timm: race each against timm's with the same weights.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8",
    size: Annotated[int, typer.Option(help="Image side, pixels.")] = 224,
    threads: Annotated[int, typer.Option()] = 1,
    rounds: Annotated[int, typer.Option(help="Alternating rounds; the median counts.")] = 15,
    as_json: Json = False,
) -> None:
    """Time and peak memory of models, alternating within one process."""
    from saccade.tools import bench as tool
    from saccade.tools.watch import Watch

    if not all(part.strip().isdigit() for part in batch.split(",")):
        raise SaccadeError(f"--batch {batch}: give numbers with commas between, as in 1,8")
    watch = Watch(Console(stderr=True))
    with watch.bar("measuring", rounds) as bar:
        def show(text: str, done: int, total: int) -> None:
            bar.at(done * rounds / total, text)
        rows = tool.bench(names, against=against, batch=[int(part) for part in batch.split(",")], size=size,
                          threads=threads, rounds=rounds, progress=show)
    if as_json:
        _print_json(rows)
    else:
        console.print(tool.table(rows))


def main() -> None:
    """The entry point: an error of the user's is one line and exit code 2, `--debug` shows where it came from."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SaccadeError as error:
        if debug:
            raise
        print(f"saccade: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
