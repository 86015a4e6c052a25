"""The figures of the comparison's page, and how it writes numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from saccade.core.optional import optional

graph = optional("plotly.graph_objects", extra="train")

# Okabe and Ito's colours that stand out on white and on black; the symbol and the dash tell apart what they cannot.
COLOURS = ("#1C80C0", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "pentagon")
DASHES = ("solid", "dash", "dot")
GREY = "#8A8F98"
HARDEST = 40  # classes shown in the recall figure; beyond that, rows would be too many to read
COUNTED = 25  # classes up to which the confusion matrix shows its counts

Contestant = dict[str, Any]  # an entry of results["contestants"]
Styles = dict[str, dict[str, Any]]


def percent(value: float) -> str:
    """0.8532 -> 85.3 %."""
    return f"{100 * value:.1f} %"


def digits(value: float) -> str:
    """Three digits that count: 0.0471, 4.70, 47.0, 470; 4700 stays whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def scaled(value: float) -> str:
    """Three digits and a decimal prefix: 28 300 000 -> 28.3 M."""
    power = 0 if value < 1000 else min(4, int(math.log10(value) // 3))
    return f"{digits(value / 1000**power)} {('', 'k', 'M', 'G', 'T')[power]}" if power else f"{value:g}"


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain) points those that no other beats: no other costs at most as much and gains at least as much."""
    kept: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((cost, gain))
    return kept


def pareto(finished: list[Contestant], styles: Styles) -> Any:
    """Accuracy with its interval against median latency, the frontier drawn; None if nobody was timed."""
    timed = [one for one in finished if latency(one, "p50")]
    if not timed:
        return None
    figure = _figure(height=480, x="Latency p50, ms (log scale)", y="Accuracy, %", legend=False)
    points = [(float(latency(one, "p50") or 0), 100 * accuracy(one)["value"]) for one in timed]
    costs, gains = zip(*points, strict=True)
    edge = frontier(points)
    figure.add_scatter(
        x=[cost for cost, _ in edge], y=[gain for _, gain in edge], mode="lines", hoverinfo="skip",
        line={"shape": "hv", "color": GREY, "width": 1.5, "dash": "dot"},
    )  # fmt: skip
    for one, (cost, gain) in zip(timed, points, strict=True):
        span, style = accuracy(one), styles[one["name"]]
        lines = [
            f"<b>{inert(one['name'])}</b>" + (" (reference)" if one["kind"] == "reference" else ""),
            f"accuracy {gain:.1f} % ({percent(span['low'])} to {percent(span['high'])})",
            f"latency p50 {digits(cost)} ms, p95 {digits(one['latency_ms']['p95'])} ms",
        ]
        lines += [f"{scaled(one['params'])} parameters"] if one["params"] else []
        figure.add_scatter(
            x=[cost], y=[gain], mode="markers", cliponaxis=False, hovertext="<br>".join(lines), hoverinfo="text",
            marker={**style["marker"], "size": 12}, error_y=_bars([span], style["colour"], width=4),
        )  # fmt: skip
    low, high = math.log10(min(costs)) - 0.35, math.log10(max(costs)) + 0.35
    if len(timed) <= 2 * len(edge) + 10:  # a crowd of labels hides the points; then hovering tells
        figure.add_scatter(
            x=costs, y=gains, mode="markers+text", text=[inert(short(one["name"])) for one in timed], hoverinfo="skip",
            marker={"size": 16, "opacity": 0}, textposition=[_side(point, points, (low, high)) for point in points],
            cliponaxis=False,
        )  # fmt: skip
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in (1, 2, 5)]
    figure.update_xaxes(type="log", range=[low, high], tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _side(point: tuple[float, float], points: list[tuple[float, float]], limits: tuple[float, float]) -> str:
    """The side of a point with more room for its label, before the next point about as high or the figure's edge."""
    here, reach = math.log10(point[0]), 0.08 * (max(gain for _, gain in points) - min(gain for _, gain in points))
    near = [math.log10(cost) for cost, gain in points if (cost, gain) != point and abs(gain - point[1]) <= reach]
    left = min(here - place for place in (*near, limits[0]) if place <= here)
    right = min(place - here for place in (*near, limits[1]) if place >= here)
    return "middle left" if left >= 0.7 * right else "bottom right"  # to the right runs the frontier


def reductions(finished: list[Contestant], styles: Styles) -> Any:
    """Accuracy against median latency along each method's rates, from its host on; None where no method was applied."""
    timed = {one["name"]: one for one in finished if latency(one, "p50")}
    lines: dict[tuple[str, str], list[Contestant]] = {}
    for one in timed.values():
        if one.get("method") and one["host"] in timed:
            lines.setdefault((one["host"], one["method"].partition(":")[0]), []).append(one)
    if not lines:
        return None
    figure = _figure(height=460, x="Latency p50, ms", y="Accuracy, %")
    alone = len({host for host, _ in lines}) == 1  # then colours are free to tell methods apart
    for number, ((host, method), points) in enumerate(lines.items()):
        # The host first, also where its slowest rate is slower than the host itself.
        points = [timed[host], *sorted(points, key=lambda one: -(latency(one, "p50") or 0))]
        colour = COLOURS[number % len(COLOURS)] if alone else styles[host]["colour"]
        symbols = ["square" if one["name"] == host else "circle" for one in points]
        figure.add_scatter(
            x=[latency(one, "p50") for one in points], y=[100 * accuracy(one)["value"] for one in points],
            text=["", *(inert(one["method"].partition(":")[2]) for one in points[1:])], textposition="bottom right",
            textfont={"size": 11}, mode="lines+markers" + ("+text" if alone else ""),
            name=inert(short(f"{host}+{method}")), hoverinfo="text", cliponaxis=False,
            hovertext=[f"<b>{inert(one['name'])}</b><br>accuracy {percent(accuracy(one)['value'])}<br>"
                       f"latency p50 {digits(latency(one, 'p50') or 0)} ms" for one in points],
            line={"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
            marker={"color": colour, "size": 9, "symbol": symbols},
        )  # fmt: skip
    return figure


def curves(finished: list[Contestant], styles: Styles) -> Any:
    """Validation accuracy by epoch: the mean over the seeds in a band from the lowest to the highest."""
    figure = _figure(height=460, x="Epoch", y="Validation accuracy, %")
    for one in finished:
        seen: dict[int, list[float]] = {}
        for curve in one["curves"]:
            for epoch, value in zip(curve["epoch"], curve["val_accuracy"], strict=True):
                seen.setdefault(epoch, []).append(100 * value)
        if not seen:
            continue
        epochs, name, style = sorted(seen), one["name"], styles[one["name"]]
        if any(len(values) > 1 for values in seen.values()):
            figure.add_scatter(
                x=epochs + epochs[::-1], line_width=0, fillcolor=_clear(style["colour"], 0.16), hoverinfo="skip",
                y=[max(seen[epoch]) for epoch in epochs] + [min(seen[epoch]) for epoch in epochs[::-1]],
                fill="toself", mode="lines", legendgroup=inert(name), showlegend=False,
            )  # fmt: skip
        means = [sum(seen[epoch]) / len(seen[epoch]) for epoch in epochs]
        texts = [
            f"<b>{inert(name)}</b><br>epoch {epoch}: {mean:.1f} %<br>"
            f"seeds: {', '.join(f'{value:.1f} %' for value in seen[epoch])}"
            for epoch, mean in zip(epochs, means, strict=True)
        ]
        figure.add_scatter(
            x=epochs, y=means, mode="lines+markers", name=inert(short(name)), legendgroup=inert(name),
            line={"color": style["colour"], "dash": style["dash"], "width": 2}, hovertext=texts, hoverinfo="text",
            marker={**style["marker"], "size": 6, "maxdisplayed": 10},
        )  # fmt: skip
    longest = max((max(trace.x) for trace in figure.data), default=0)
    figure.update_xaxes(dtick=1 if longest <= 12 else None)  # no half epochs
    return figure if figure.data else None


def recall(classes: list[str], finished: list[Contestant], chosen: Contestant, styles: Styles) -> Any:
    """Recall of each class by each contestant, the chosen one's with its interval, its hardest class first."""
    tested = [name for name in classes if name in chosen["recall"]]
    hardest = sorted(tested, key=lambda name: chosen["recall"][name]["value"])[:HARDEST]
    figure = _figure(height=150 + 34 * len(hardest), x="Recall, %", y="")
    lowest = 1.0
    for number, one in enumerate(finished):
        mine, style = one is chosen, styles[one["name"]]
        spans = [one["recall"][name] for name in hardest]
        lowest = min(lowest, *(span["low" if mine else "value"] for span in spans))
        shift = 0.5 * (number - (len(finished) - 1) / 2) / len(finished)  # equal values lie side by side
        texts = [
            f"<b>{inert(name)}</b><br>{inert(one['name'])}: {percent(span['value'])} "
            f"({percent(span['low'])} to {percent(span['high'])})"
            for name, span in zip(hardest, spans, strict=True)
        ]
        figure.add_scatter(
            x=[100 * span["value"] for span in spans], y=[row + shift for row in range(len(hardest))], mode="markers",
            name=inert(short(one["name"])), hovertext=texts, hoverinfo="text", cliponaxis=False,
            marker={**style["marker"], "size": 12 if mine else 7},
            error_x=_bars(spans, style["colour"], width=0) if mine else None,
        )  # fmt: skip
    figure.update_xaxes(range=[max(-2, 100 * lowest - 4), 102])
    names = [inert(short(name, 18)) for name in hardest]
    rows = list(range(len(hardest)))
    figure.update_yaxes(tickvals=rows, ticktext=names, range=[len(hardest) - 0.5, -0.5], showgrid=False)
    for row in rows[1:]:
        figure.add_hline(y=row - 0.5, line={"color": GREY, "width": 0.5}, opacity=0.35)
    return figure


def confusion(classes: list[str], counts: list[list[int]]) -> Any:
    """The confusion matrix (rows: truth) as a heat map of the shares of its rows."""
    size = len(classes)
    figure = _figure(height=max(340, min(720, 150 + 32 * size)), x="Predicted", y="Truth", legend=False)
    table = np.asarray(counts)
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    right, wrong = COLOURS[:2]
    scale = [(place, _clear(wrong, opacity)) for place, opacity in ((0, 0.9), (0.35, 0.7), (0.47, 0.25), (0.5, 0))]
    scale += [(0.5, _clear(right, 0)), (1, _clear(right, 0.75))]
    names = [inert(name) for name in classes]
    texts = np.full(table.shape, "", dtype=object)
    for t, p in zip(*np.nonzero(table), strict=True):
        texts[t, p] = f"{names[t]} taken for {names[p]}: {counts[t][p]} ({percent(shares[t, p])})"
    signed = np.where(np.eye(size, dtype=bool), shares, 0 - shares).astype(np.float32)
    figure.add_heatmap(
        z=signed, zmin=-1, zmax=1, showscale=False, colorscale=scale, hovertext=texts, hoverinfo="text",
        xgap=1 if size <= 60 else 0, ygap=1 if size <= 60 else 0,
    )  # fmt: skip
    if size <= COUNTED:
        figure.update_traces(text=[[count or "" for count in row] for row in counts], texttemplate="%{text}")
    every = math.ceil(size / 30)
    ticks = {"tickvals": list(range(0, size, every)), "showgrid": False, "zeroline": False}
    ticks["ticktext"] = [inert(short(name, 18)) for name in classes[::every]]
    figure.update_xaxes(**ticks, tickangle=-45 if size > 6 and max(map(len, classes)) > 3 else 0)
    figure.update_yaxes(**ticks, autorange="reversed")
    return figure


def _figure(*, height: int, x: str, y: str, legend: bool = True) -> Any:
    """An empty figure on the page's own ground; the page's style sheet colours its text and lines, light or dark."""
    figure = graph.Figure()
    figure.update_layout(
        template="none", height=height, autosize=True, showlegend=legend, dragmode=False, hovermode="closest",
        margin={"l": 8, "r": 16, "t": 12, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13}, hoverlabel={"align": "left", "namelength": -1},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    figure.update_xaxes(title={"text": x, "standoff": 12}, automargin=True, zeroline=False, fixedrange=True)
    figure.update_yaxes(title={"text": y, "standoff": 12}, automargin=True, zeroline=False, fixedrange=True)
    return figure


def styles_of(finished: list[Contestant]) -> Styles:
    """How each contestant is drawn, the same in every figure; references are grey and hollow."""
    styles: Styles = {}
    for kind, colours, end in (("model", COLOURS, ""), ("reference", (GREY,), "-open")):
        for number, one in enumerate(one for one in finished if one["kind"] == kind):
            colour, symbol = colours[number % len(colours)], SYMBOLS[number % len(SYMBOLS)] + end
            marker = {"color": colour, "symbol": symbol, "line": {"color": colour, "width": 2}}
            dash = DASHES[number // len(colours) % len(DASHES)]
            styles[one["name"]] = {"colour": colour, "dash": dash, "marker": marker}
    return styles


def _bars(spans: list[dict[str, float]], colour: str, width: int) -> dict[str, Any]:
    up = [100 * (span["high"] - span["value"]) for span in spans]
    down = [100 * (span["value"] - span["low"]) for span in spans]
    return {"array": up, "arrayminus": down, "symmetric": False, "color": colour, "thickness": 1.5, "width": width}


def _clear(colour: str, opacity: float) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},{opacity})"


def inert(text: str) -> str:
    """Plotly reads labels as HTML of its own kind: nothing of the data's may act as such."""
    return html.escape(text, quote=False)


def short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def is_blind(one: Contestant) -> bool:
    """Whether it gives the same answer for every picture, as the majority class does."""
    return sum(any(column) for column in zip(*one["confusion"], strict=True)) <= 1


def accuracy(one: Contestant) -> dict[str, float]:
    span: dict[str, float] = one["metrics"]["accuracy"]
    return span


def latency(one: Contestant, quantile: str) -> float | None:
    return one["latency_ms"][quantile] if one["latency_ms"] else None
