"""The one direction between rooms, file lengths, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "saccade"
ROOMS = ["core", "golden", "ops", "parts", "papers", "integrations", "learn", "attribution", "tools", "cli"]
FILES = sorted(ROOT.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("saccade.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrow(path):
    """core -> ops -> parts -> papers -> integrations, learn, attribution, tools -> cli; nothing points back."""
    here = path.relative_to(ROOT).parts
    if here == ("__init__.py",):
        return
    for name in imports(path):
        there = name.split(".")[1:]
        if room(tuple(there)) not in ROOMS:
            continue
        assert ROOMS.index(room(tuple(there))) <= ROOMS.index(room(here)), f"{path.name} imports {name}"
        if here[0] == "papers" and there[0] == "papers":
            assert here[1].removesuffix(".py") == there[1], f"the paper {path.name} imports the paper {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert max((len(line) for line in lines), default=0) <= 120


def test_importing_pulls_in_no_optional_package_and_no_paper():
    code = ("import sys, saccade; print(*sorted(m for m in sys.modules if m.split('.')[0] in "
            "('timm', 'torchvision', 'lightning', 'torchmetrics', 'sklearn', 'skimage', 'plotly', 'onnx', "
            "'onnxruntime', 'transformers', 'typer', 'rich') or m.startswith('saccade.papers.')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
