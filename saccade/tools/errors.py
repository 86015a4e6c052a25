"""How equal is equal: the worst error of every golden, as a table and a picture.

    python -m saccade.tools.errors    docs/errors.md and docs/errors.svg, in a checkout; some five minutes
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from html import escape
from importlib import import_module
from statistics import median

from saccade.core.files import write_whole
from saccade.core.index import index
from saccade.golden import read_golden
from saccade.tools.pages import DOCS, ROOT, paper_link
from saccade.tools.port import errors
from saccade.tools.verify import verify

NAMED = 3  # models with the largest errors, named in the picture where names have room

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 380, 62, 30, 16, 44
LOWEST, HIGHEST = -7.6, -2.6  # powers of ten; what is less stands on the lowest
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3d4450 }
.line { stroke: #c9ced6 } .tolerance { stroke: #d55e00; stroke-width: 2 } .warn { fill: #b34d00 }
.model { fill: #1c80c0 } .part { fill: none; stroke: #7a8594 }
@media (prefers-color-scheme: dark) {
  text { fill: #c6ccd6 } .line { stroke: #3a414c } .warn { fill: #f0904a }
  .model { fill: #56b4e9 } .part { stroke: #8a94a3 }
}"""


@dataclass(frozen=True)
class Worst:
    """The worst error of a golden, in standard deviations of the authors' value, and what it is the error of."""

    golden: str
    paper: str
    model: bool
    what: str
    error: float
    tolerance: float
    numbers: int


def measure(name: str, paper: str) -> Worst:
    """Whole models take the way of a user's checkpoint, all else its port in tests/ports.

    Numbers of a golden that are themselves wrong (tests/contracts/exceptions.toml) are left out.
    """
    golden, known = read_golden(ROOT / "tests" / "goldens" / f"{name}.json"), index()
    model = name in known["models"] or name in known["aliases"]
    if model:
        found = {verdict.what: verdict.error for verdict in verify(golden) if verdict.what != "parameters"}
    else:
        found = errors(import_module(f"tests.ports.{paper}").build(golden), golden)
    exceptions = import_module("tests.contracts.registered").EXCEPTIONS
    for entry in exceptions:
        if entry["name"] == name:
            found.pop(entry["contract"], None)
    what = max(found, key=lambda key: found[key])
    return Worst(name, paper, model, what, found[what], golden["tolerance"], len(found))


def page(rows: list[Worst]) -> str:
    """`docs/errors.md`: the picture and the numbers, the worst first."""
    models = [row for row in rows if row.model]
    numbers, middle = sum(row.numbers for row in rows), median(row.error for row in rows)
    exact = sum(row.error == 0 for row in rows)
    lines = [
        "# Errors", "",
        f"The worst error of {len(models)} models and {len(rows) - len(models)} operators and modules over all that",
        f"their goldens hold: {numbers} outputs, inner maps and gradients. The unit is the standard deviation of the",
        f"authors' value ([how it is computed](goldens.md)). The median is {middle:.1e}, and {exact} agree to the last",
        "bit. One thread of a CPU, float32 unless a golden says otherwise; other processors round otherwise. "
        "Numbers of", "three goldens that are themselves wrong are left out "
        "([exceptions](../tests/contracts/exceptions.toml)).",
        "Written by `python -m saccade.tools.errors`.", "",
        "![The worst error of every golden](errors.svg)", "",
        "| golden | system | worst error | of | tolerance |", "|---|---|--:|---|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row.error):
        lines.append(f"| {row.golden} | {paper_link(row.paper)} | {row.error:.1e} | {row.what} | {row.tolerance:g} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[Worst]) -> str:
    """The goldens in the order of their worst error (logarithmic), under their tolerances; for light and dark."""
    rows = sorted(rows, key=lambda row: row.error)
    step = (WIDTH - LEFT - RIGHT) / len(rows)
    bottom = HEIGHT - BOTTOM

    def x(rank: int) -> float:
        return LEFT + step * (rank + 0.5)

    def y(error: float) -> float:
        power = math.log10(error) if error > 0 else LOWEST
        return TOP + (bottom - TOP) * (HIGHEST - max(power, LOWEST)) / (HIGHEST - LOWEST)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
             "<title>The worst error of every golden, sorted</title>", f"<style>{STYLE}</style>",
             f'<text x="{LEFT}" y="16">Worst error of each golden, standard deviations of the authors\' value</text>']
    for power in range(math.ceil(LOWEST), math.floor(HIGHEST) + 1):
        at = y(10.0**power)
        parts.append(f'<path class="line" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{bottom + 4}" text-anchor="end">less</text>')
    for rank, row in enumerate(rows):
        parts.append(f'<path class="tolerance" d="M{x(rank) - step / 2:.1f} {y(row.tolerance):.1f}h{step:.2f}"/>')
    for rank, row in enumerate(rows):
        kind, size = ("model", 3.2) if row.model else ("part", 2.4)
        parts.append(f'<circle class="{kind}" cx="{x(rank):.1f}" cy="{y(row.error):.1f}" r="{size}">'
                     f"<title>{escape(row.golden)}: {row.error:.1e} ({escape(row.what)})</title></circle>")
    named: list[float] = []
    for rank, row in reversed([*enumerate(rows)]):
        at = y(row.error)
        if row.model and len(named) < NAMED and all(abs(at - other) >= 14 for other in named):
            named.append(at)
            parts.append(f'<text x="{x(rank) - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(row.golden)}</text>')
    less, exact = (sum(row.error <= most for row in rows) for most in (10**LOWEST, 0.0))
    middle = median(row.error for row in rows)
    parts.append(f'<text x="{x(less) + 6:.1f}" y="{bottom + 4}">{exact} to the last bit</text>'
                 f'<text x="{x(len(rows) // 2):.1f}" y="{y(middle) + 22:.1f}" text-anchor="middle">'
                 f"median {middle:.1e}</text>")
    legend = bottom + 30
    parts += [f'<circle class="model" cx="{LEFT + 6}" cy="{legend - 4}" r="3.2"/>'
              f'<text x="{LEFT + 16}" y="{legend}">{sum(row.model for row in rows)} models</text>',
              f'<circle class="part" cx="{LEFT + 106}" cy="{legend - 4}" r="2.4"/>'
              f'<text x="{LEFT + 116}" y="{legend}">{sum(not row.model for row in rows)} operators and modules</text>',
              f'<path class="tolerance" d="M{LEFT + 290} {legend - 4}h16"/>'
              f'<text class="warn" x="{LEFT + 314}" y="{legend}">tolerance</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    claimed = {golden: paper for paper, card in index()["papers"].items() for golden in card["goldens"]}
    rows = []
    for number, (name, paper) in enumerate(claimed.items(), 1):
        print(f"{number} of {len(claimed)}: {name}", file=sys.stderr)
        rows.append(measure(name, paper))
    write_whole(DOCS / "errors.md", page(rows))
    write_whole(DOCS / "errors.svg", picture(rows))
    return int(any(row.error > row.tolerance for row in rows))


if __name__ == "__main__":
    sys.exit(main())
