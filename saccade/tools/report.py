"""The page that `saccade compare` leaves behind: one HTML file that explains its numbers and loads nothing."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional
from saccade.tools import report_figures as draw
from saccade.tools.measure import EAGER, INT8, ONNX
from saccade.tools.render import render
from saccade.tools.report_figures import Contestant, accuracy, digits, is_blind, latency, percent, scaled

plotly_io = optional("plotly.io", extra="train")

STARTS = {
    "scratch": "the models were trained from random weights",
    "finetune": "the models began with pretrained weights and were trained as a whole",
    "probe": "the models began with pretrained weights, which stayed frozen, and only a linear classifier was trained",
}


@dataclass(frozen=True)
class Column:
    """A column of the table: where its number is found, how it is written and which end comes first."""

    title: str
    value: Callable[[Contestant], float | None]
    write: Callable[[float], str]
    best: str = "ascending"
    span: Callable[[Contestant], dict[str, float] | None] = lambda one: None  # its interval


def duration(seconds: float) -> str:
    """44.1 s, 13.5 min or 2.25 h."""
    size, unit = (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
    return f"{digits(seconds / size)} {unit}"


def _metric(name: str, title: str) -> Column:
    return Column(title, lambda one: one["metrics"][name]["value"], percent, "descending",
                  lambda one: one["metrics"][name])


def _milliseconds(title: str, value: Callable[[Contestant], float | None]) -> Column:
    return Column(title, value, lambda value: f"{digits(value)} ms")


def _also(how: str) -> Callable[[Contestant], float | None]:
    """The median latency by what does not count in the ranking."""
    def found(one: Contestant) -> float | None:
        took = (one.get("latencies_ms") or {}).get(how)
        return None if took is None or took == one["latency_ms"] else took["p50"]
    return found


COLUMNS = (
    _metric("accuracy", "Accuracy"),
    _metric("balanced_accuracy", "Balanced accuracy"),
    _metric("macro_f1", "Macro-F1"),
    Column("k-NN accuracy", lambda one: (one.get("knn_accuracy") or {}).get("value"), percent, "descending"),
    Column("Parameters", lambda one: one["params"], scaled),
    Column("MACs", lambda one: one["macs"], scaled),
    _milliseconds("Latency p50", lambda one: latency(one, "p50")),
    _milliseconds("Latency p95", lambda one: latency(one, "p95")),
    _milliseconds("PyTorch p50", _also(EAGER)),
    _milliseconds("onnxruntime p50", _also(ONNX)),
    _milliseconds("int8 p50", _also(INT8)),
    Column("int8 accuracy", lambda one: (one.get("int8_accuracy") or {}).get("value"), percent, "descending",
           lambda one: one.get("int8_accuracy")),
    Column("Images/s", lambda one: one["throughput"], digits, "descending"),
    Column("Peak memory", lambda one: one["peak_memory"], lambda value: f"{digits(value / 2**20)} MiB"),
    Column("Training time", lambda one: one["training_seconds"], duration),
    Column("Learning rate", lambda one: one["learning_rate"], lambda value: f"{value:.3g}"),
)


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write results.json's content as one HTML page that needs no network; an earlier page is replaced at once or not.

    Raises: SaccadeError if a part of the results is missing or a picture is not inside the results.
    """
    page = _page(results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _page(results: dict[str, Any]) -> str:
    if missing := [key for key in ("data", "settings", "contestants") if key not in results]:
        raise SaccadeError(f"these results have no {missing[0]!r}: give the results.json that saccade compare wrote")
    finished = [one for one in results["contestants"] if one["failed"] is None]
    finished.sort(key=lambda one: -accuracy(one)["value"])
    advice = results.get("recommendation") or {}
    seeing = [one for one in finished if not is_blind(one)]
    chosen = next((one for one in seeing if one["name"] == advice.get("choice")), None)
    shown = chosen or (finished[0] if finished else None)
    columns = [column for column in COLUMNS if any(column.value(one) is not None for one in finished)]
    styles = draw.styles_of(finished)
    classes = results["data"]["classes"]
    figures: dict[str, Any] = {"pareto": draw.pareto(finished, styles),
                               "reductions": draw.reductions(finished, styles), "curves": draw.curves(finished, styles)}
    if shown is not None:
        figures["recall"] = draw.recall(classes, seeing or finished, shown, styles)
        figures["confusion"] = draw.confusion(classes, shown["confusion"])
    return render(
        "report.html.jinja",
        results=results,
        advice=advice,
        start=results["settings"]["start"],
        starts=STARTS,
        columns=columns,
        rows=[_row(one, columns, advice, chosen is one) for one in finished],
        scale=_scale(finished),
        failed=[one for one in results["contestants"] if one["failed"] is not None],
        shown=shown,
        mistakes=_mistakes(classes, shown["confusion"]) if shown else [],
        shown_classes=min(len(classes), draw.HARDEST),
        settings=[(_title(key), _plain(value)) for key, value in results["settings"].items()],
        looks=_looks(results.get("looks") or {}),
        figures=_embed({name: figure for name, figure in figures.items() if figure is not None}),
    )


def _row(one: Contestant, columns: list[Column], advice: dict[str, Any], is_chosen: bool) -> dict[str, Any]:
    """What the table shows of one contestant; an unknown number sorts last."""
    cells = []
    for column in columns:
        value = column.value(one)
        text = "–" if value is None else column.write(value)
        cells.append({"value": "" if value is None else value, "text": text, "interval": column.span(one)})
    badges = ["recommended"] if is_chosen else []
    badges += ["most accurate"] if one["name"] == advice.get("best") else []
    badges += ["tied with the best"] if one["name"] in advice.get("tied", ()) and "most accurate" not in badges else []
    badges += ["reference"] if one["kind"] == "reference" else []
    return {"name": one["name"], "badges": badges, "cells": cells}


def _scale(finished: list[Contestant]) -> tuple[float, float]:
    """The scale of the table's accuracy bars: from the lowest interval of a network to the highest of anybody."""
    networks = [one for one in finished if one["latency_ms"]] or finished
    low = min((accuracy(one)["low"] for one in networks), default=0.0)
    high = max((accuracy(one)["high"] for one in finished), default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _mistakes(classes: list[str], counts: list[list[int]], most: int = 5) -> list[dict[str, Any]]:
    """The most frequent confusions, with their share of the pictures of the true class."""
    found = sorted(
        ((count, t, p) for t, row in enumerate(counts) for p, count in enumerate(row) if t != p and count), reverse=True
    )
    return [
        {"truth": classes[t], "predicted": classes[p], "count": count, "share": count / sum(counts[t])}
        for count, t, p in found[:most]
    ]


def _looks(looks: dict[str, Any]) -> dict[str, Any]:
    """The gallery by rows: a picture, then what each model made of it."""
    models = list(looks.get("maps", {}))
    rows = []
    for number, image in enumerate(looks.get("images", [])):
        seen = [looks["maps"][model][number] for model in models]
        for address in (image["picture"], *(one["overlay"] for one in seen)):
            if not address.startswith("data:image/"):
                raise SaccadeError(f"the picture {address[:60]!r} is not in the results: give a data:image/ address")
        seen = [{**one, "crisp": _is_small(one["overlay"])} for one in seen]
        rows.append({**image, "crisp": _is_small(image["picture"]), "seen": seen})
    return {"models": models, "rows": rows}


def _is_small(address: str) -> bool:
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return max(picture.size) < 96


def _embed(figures: dict[str, Any]) -> dict[str, str]:
    """Each figure as HTML; the first one brings the library along."""
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return {
        name: plotly_io.to_html(
            figure, config=config, full_html=False, include_plotlyjs=number == 0, div_id=f"{name}-plot",
            default_height=f"{figure.layout.height}px",
        )
        for number, (name, figure) in enumerate(figures.items())
    }  # fmt: skip


def _title(key: str) -> str:
    return key.replace("_", " ").replace("img", "image").capitalize()


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(one) for one in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
