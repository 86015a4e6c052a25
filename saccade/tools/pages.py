"""Tables of docs/: a row a model, a word a cell; what takes more words stands as a numbered line beneath the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of a checkout
DOCS = ROOT / "docs"
Rows = Mapping[str, Mapping[str, str]]


def page(title: str, text: str, columns: Sequence[str], rows: Rows) -> str:
    """Markdown of the table {row: {column: cell}}."""
    long = list(dict.fromkeys(cell for cells in rows.values() for cell in cells.values() if " " in cell))
    lines = [f"# {title}", "", text, "", f"| | {' | '.join(columns)} |", "|---|" + ":-:|" * len(columns)]
    for row, cells in rows.items():
        marks = [f"[{long.index(cells[column]) + 1}]" if cells[column] in long else cells[column] for column in columns]
        lines.append(f"| {row} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(long, 1))]).rstrip() + "\n"


def paper_link(paper: str, words: str | None = None) -> str:
    """A paper's file, as a page of docs/ links it."""
    return f"[{words or paper}](../saccade/papers/{paper}.py)"


def recorded_in(path: Path) -> dict[str, dict[str, str]]:
    """The table of the page at `path`; none where there is no page yet."""
    return recorded(path.read_text(encoding="utf-8")) if path.exists() else {}


def recorded(text: str) -> dict[str, dict[str, str]]:
    """The table that a page holds."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    long = [line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()]
    return {row: {column: long[int(mark[1:-1]) - 1] if mark.startswith("[") else mark
                  for column, mark in zip(rows[0][1:], marks, strict=True)} for row, *marks in rows[2:]}
