"""What all commands share: the application, the console, options, tables."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import saccade

app = typer.Typer(
    help="Vision backbones and attention, checked against their authors' code.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[
    str, typer.Argument(help="A folder with a sub-folder per class, a CSV, or the built-in tiles, planted or digits.")
]
Strict = Annotated[bool, typer.Option("--strict", help="A broken image is an error instead of skipped.")]

Devices = Annotated[int, typer.Option(help="Processes (GPUs, or CPU processes) a node.")]
Nodes = Annotated[int, typer.Option(help="Machines that train together.")]
Strategy = Annotated[str, typer.Option(help="How processes share the work: auto, ddp or fsdp.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        console.print(f"saccade {saccade.__version__}")
        raise typer.Exit


def table(*columns: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, no_wrap=True)
    return shown


def megabytes(size: int | None) -> str:
    return "size unknown" if size is None else f"{size / 1e6:.1f} MB"


def listed(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))
