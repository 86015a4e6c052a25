"""`saccade list`, `find`, `info`: what the library has."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import saccade
from saccade.cli.shared import Json, app, console, megabytes, print_json, table
from saccade.core.errors import SaccadeError
from saccade.core.index import index, is_backbone, list_mixers, list_models, paper_module, resolve_model
from saccade.core.weights import is_permissive, published, status


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, as in '*former*'.")] = "*",
    kind: Annotated[str, typer.Option(help="backbone or mixer.")] = "backbone",
    licence: Annotated[str, typer.Option(help="permissive: only models that have weights under such a licence.")] = "",
    as_json: Json = False,
) -> None:
    """The registered models (or, by --kind, mixers)."""
    if kind not in ("backbone", "mixer"):
        raise SaccadeError(f"--kind {kind}: choose backbone or mixer")
    if licence and (licence != "permissive" or kind != "backbone"):
        raise SaccadeError(f"--licence {licence}: choose permissive, for backbones")
    known = index()
    names = list_models(pattern) if kind == "backbone" else list_mixers(pattern)
    names = [name for name in names if not licence or is_permissive(name)]
    if as_json:
        print_json(names)
        return
    shown = table(kind, "paper", "params", "MACs", "top-1") if kind == "backbone" else table(kind, "paper")
    for name in names:
        card = known["papers"][known["models" if kind == "backbone" else "mixers"][name]]
        numbers = [_millions(card["params"].get(name)), _giga(card["macs"].get(name)), str(card["top1"].get(name, ""))]
        shown.add_row(name, f"{card['title'][:60]} ({card['year']})", *(numbers if kind == "backbone" else ()))
    console.print(shown)
    if not names:
        console.print(f"no {kind} {'with such weights ' if licence else ''}matches {pattern!r}")


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
        "quirks of the published code": " ".join(card["quirks"]),
    }
    if name in known["mixers"]:
        facts |= {"mixer": f"{name} ({card['mixers'][name]})"}
    elif name in known["papers"] and name not in known["models"]:
        facts |= {"models": ", ".join(card["models"]), "mixers": ", ".join(card["mixers"])}
    else:
        facts |= _model_facts(resolve_model(name), card, size)
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if value:
            console.print(f"[bold]{key}[/]: {value}")


def _model_facts(name: str, card: dict[str, Any], size: int) -> dict[str, Any]:
    import torch

    from saccade.core.build import accepted, native_size
    from saccade.core.features import FeatureInfo
    from saccade.core.load import key_maps
    from saccade.tools.measure import count_macs

    known, settings = accepted(name), paper_module(index()["models"][name]).SIZES[name]
    options: dict[str, Any] = {"img_size": size} if size and "img_size" in known else {}
    model = saccade.create_model(name, **options).eval()
    maps = FeatureInfo()
    if is_backbone(name):
        maps = saccade.create_model(name, features_only=True, **options).feature_info
    native = size or native_size(name)
    sides = (native, native) if isinstance(native, int) else tuple(native)
    macs = count_macs(model, (torch.zeros(1, settings.get("in_chans", 3), *sides),))
    return {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
                      + (f" (paper: {_millions(card['params'][name])})" if name in card["params"] else ""),
        "multiply-adds": f"{macs / 1e9:.3f} G at {'x'.join(map(str, sides))}"
                         + (f" (paper: {_giga(card['macs'][name])})" if name in card["macs"] else ""),
        "maps": ", ".join(f"{channels} at 1/{stride}" for channels, stride in zip(maps.channels(), maps.reduction())),
        "checkpoints that load": ", ".join(key_maps(name)),
        "top-1 claimed": card["top1"].get(name, ""),
        **(_weights_facts(name) if name in card["weights"] else {}),
    }


def _weights_facts(name: str) -> dict[str, Any]:
    weights = published(name)
    evaluation = (f"{weights.img_size} px, crop {weights.crop:g}, {weights.interpolation}, "
                  f"mean {_numbers(weights.mean)}, std {_numbers(weights.std)}")
    return {
        "published weights": f"{weights.source} ({weights.data}, licence {weights.licence})",
        "mirrors": ", ".join(weights.mirrors),
        "their status": status(name),
        "their file": f"{weights.layout} layout, {megabytes(weights.bytes)}, sha256 {weights.sha256}",
        "their evaluation": evaluation if is_backbone(name) else "",
        "top-1 claimed": weights.top1 or "",
    }


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
