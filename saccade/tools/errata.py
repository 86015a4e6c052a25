"""The ledger of quirks: where a published code is not what its paper says, or not what a reader expects.

docs/errata.toml holds it; docs/errata.md and what `saccade info` says of a paper are made of it by `tools.catalog`.
"""

from __future__ import annotations

from typing import Any

from saccade.core.card import Card
from saccade.tools.pages import ROOT, paper_link

LEDGER = "docs/errata.toml"

Quirk = dict[str, Any]


def read() -> list[Quirk]:
    """The entries of the ledger, by paper; what they hold is told at the head of the file."""
    import tomllib  # Python >= 3.11; the ledger is read in a checkout alone

    return tomllib.loads((ROOT / LEDGER).read_text(encoding="utf-8"))["quirk"]


def page(known: dict[str, Card]) -> str:
    """`docs/errata.md`: what was measured, then every quirk by paper."""
    quirks = read()
    measured = sorted((one for one in quirks if isinstance(one.get("effect"), float)), key=lambda one: -one["effect"])
    count, papers = len(quirks), len({one["paper"] for one in quirks})
    lines = [
        "# Errata", "",
        f"Where a published code is not what its paper says, or not what a reader would expect: {count} quirks of",
        f"{papers} systems, found while their numbers were met. They are kept, so that checkpoints work, unless it",
        "says otherwise; a few are defects of the goldens themselves. What the paper says is left empty where it is",
        "silent or was not compared. Corrections are welcome: an entry in [errata.toml](errata.toml), from which",
        "`python -m saccade.tools.catalog` writes this page.", "",
        "## Measured", "",
        "How far the golden's output moves, root mean square, in its standard deviations, if our code did the other",
        "thing, on the golden's random weights ([the test](../tests/tools/test_errata.py)). Released weights were",
        "trained with the quirk.", "",
        "| system | the code does | change | golden |", "|---|---|--:|---|",
        *(f"| {paper_link(one['paper'])} | {one['does']} | {one['effect']:.2g} | {_named(one['goldens'])[0]} |"
          for one in measured),
        "", "## All", "",
        "| system | the paper says | the code does | effect | where |", "|---|---|---|---|---|",
    ]
    for one in quirks:
        card, effect = known[one["paper"]], one.get("effect", "not measured")
        effect = f"{effect:.2g} standard deviations" if isinstance(effect, float) else effect
        where = ", ".join([*([card.code.split()[0]] if card.code else []), *_named(one.get("goldens", []))])
        lines.append(f"| {paper_link(one['paper'])} | {one.get('says', '')} | {one['does']} | {effect} | {where} |")
    return "\n".join(lines) + "\n"


def _named(goldens: list[str]) -> list[str]:
    return [f"[{name}](../tests/goldens/{name}.json)" for name in goldens]

