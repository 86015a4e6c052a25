"""Token mixers against the number of tokens: time and memory, and how they grow (`saccade bench --mixers`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from saccade.core.build import create_mixer
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.index import list_mixers, mixer_paper
from saccade.core.optional import optional
from saccade.core.site import Site
from saccade.tools.measure import limited_threads, peak_memory, race

graph_objects = optional("plotly.graph_objects", extra="train")
subplots = optional("plotly.subplots", extra="train")

Row = dict[str, Any]
CHANNELS = 64  # two heads; all mixers can be built so


def sides(tokens: int) -> tuple[int, int]:
    """The grid of so many tokens that is nearest to a square."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def lengths(
    mixers: Sequence[str], tokens: Sequence[int], *, threads: int = 1, rounds: int = 5, limit: float = 5.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """One row a mixer: seconds (the median) and bytes (the peak, beside the input) of a forward, by numbers of tokens.

    On grids that are as square as may be, each the mixer's native one, `CHANNELS` wide, float32, batch 1. A mixer that
    takes more than `limit` seconds is not asked for longer ones. `mixers` may be ["all"]. Exponents are those of the
    last two numbers of tokens, where what is constant weighs least. Raises SaccadeError for names that are no mixers.
    """
    names = list_mixers() if list(mixers) == ["all"] else list(mixers)
    for name in names:
        mixer_paper(name)
    if not names or len(tokens) < 2 or min(*tokens, rounds, threads) < 1 or sorted(set(tokens)) != list(tokens):
        raise SaccadeError(f"nothing to measure in mixers={names}, tokens={list(tokens)}, rounds={rounds}, "
                           f"threads={threads}: give mixers, and two or more numbers of tokens, the smaller first")
    rows = []
    with limited_threads(threads), torch.inference_mode():
        for place, name in enumerate(names):
            row: Row = {"mixer": name, "seconds": {}, "bytes": {}}
            for count in tokens:
                if row["seconds"] and max(row["seconds"].values()) > limit:
                    break
                if progress is not None:
                    progress(f"{name}, {count} tokens", place, len(names))
                grid = sides(count)
                torch.manual_seed(0)
                call = partial(create_mixer(name, Site(CHANNELS, 2, grid=grid)).eval(), torch.randn(1, *grid, CHANNELS))
                row["seconds"][count] = median(race({name: call}, rounds=rounds, warmup=1)[name])
                row["bytes"][count] = peak_memory(call)
            rows.append(row | {"time_exponent": exponent(row["seconds"]), "memory_exponent": exponent(row["bytes"])})
    return rows


def exponent(values: dict[int, float]) -> float | None:
    """a of value ~ N^a between the last two N; None where there are no two, or nothing to grow."""
    (n, first), (m, second) = [*((0, 0.0), (0, 0.0)), *values.items()][-2:]
    return math.log(second / first) / math.log(m / n) if n and first > 0 and second > 0 else None


def cells(row: Row, tokens: Sequence[int]) -> list[str]:
    """The row's entries, as they are shown: milliseconds, exponent, MiB, exponent."""
    shown = [f"{1e3 * row['seconds'][n]:.2f}" if n in row["seconds"] else "" for n in tokens]
    shown.append("" if row["time_exponent"] is None else f"{row['time_exponent']:.2f}")
    shown += [f"{row['bytes'][n] / 2**20:.1f}" if n in row["bytes"] else "" for n in tokens]
    return [*shown, "" if row["memory_exponent"] is None else f"{row['memory_exponent']:.2f}"]


def titles(tokens: Sequence[int]) -> list[str]:
    return ["mixer", *(f"ms at {n}" for n in tokens), "grows as N^", *(f"MiB at {n}" for n in tokens), "grows as N^ "]


def table(rows: Sequence[Row], tokens: Sequence[int]) -> Table:
    """The rows of `lengths` for the terminal."""
    shown = Table(*titles(tokens))
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(row["mixer"], *cells(row, tokens))
    return shown


def markdown(rows: Sequence[Row], tokens: Sequence[int]) -> str:
    """The rows of `lengths` as a table of a page."""
    lines = [f"| {' | '.join(titles(tokens))} |", f"|---|{'--:|' * (len(titles(tokens)) - 1)}"]
    return "\n".join([*lines, *(f"| {row['mixer']} | {' | '.join(cells(row, tokens))} |" for row in rows)])


# The colour of a mixer by how its time grows, each kind a name and the exponent that it ends at.
KINDS = (("nearly linear", 1.3, "#1f77b4"), ("between", 1.7, "#e0a100"), ("nearly quadratic", math.inf, "#c0392b"))
NAMED = 4  # slowest and fastest mixers that have their names in the plot


def plot(rows: Sequence[Row], path: Path) -> None:
    """A page of two plots, time and memory against tokens, both axes logarithmic; a line a mixer, its name on hover."""
    figure = subplots.make_subplots(1, 2, subplot_titles=("time of a forward, ms", "peak memory, MiB"))
    shown: set[str] = set()
    for row in rows:
        grows = row["time_exponent"] or 0.0
        kind, _, colour = next(each for each in KINDS if grows < each[1])
        for column, (key, unit) in enumerate((("seconds", 1e-3), ("bytes", 2**20)), 1):
            values = {n: value / unit for n, value in row[key].items() if value > 0}
            figure.add_trace(graph_objects.Scatter(
                x=list(values), y=list(values.values()), mode="lines", name=kind, legendgroup=kind,
                showlegend=column == 1 and kind not in shown, opacity=0.55, line={"color": colour, "width": 1.2},
                hovertemplate=f"{row['mixer']}<br>%{{x}} tokens: %{{y:.3g}}<extra></extra>"), 1, column)
        shown.add(kind)
    for column, key, unit in ((1, "seconds", 1e-3), (2, "bytes", 2**20)):
        for name, x, y in _extremes(rows, key):
            figure.add_annotation(x=math.log10(x), y=math.log10(y / unit), text=name, showarrow=False, xanchor="left",
                                  xshift=6, font={"size": 10}, row=1, col=column)
    longest = max(max(row["seconds"]) for row in rows)
    shortest = min(min(row["seconds"]) for row in rows)
    figure.update_xaxes(type="log", title="tokens", range=[math.log10(shortest), math.log10(longest) + 0.55])
    figure.update_yaxes(type="log", dtick=1)
    figure.update_layout(template="plotly_white", height=820, hovermode="closest", legend_title="time grows")
    write_whole(path, figure.to_html(include_plotlyjs=True))


def _extremes(rows: Sequence[Row], key: str) -> list[tuple[str, int, float]]:
    """Name, tokens and value of the mixers with the largest and the smallest last values, and of plain attention."""
    last = [(row["mixer"], *[*row[key].items()][-1]) for row in rows if [*row[key].values()][-1] > 0]
    ranked = sorted((each for each in last if each[0] != "identity"), key=lambda each: (-each[1], each[2]))
    named = {each[0]: each for each in (*ranked[:NAMED], *ranked[-NAMED:])}
    return [*named.values(), *(each for each in last if each[0] == "attention" and each[0] not in named)]
