"""What the pages show is what happens: their code runs, and prints what they say."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch

from saccade.golden import make_state, read_golden

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code of a page, each with the output that is shown below it (nothing where none is)."""
    found = [match.groups() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    below = [text if kind == "text" else "" for kind, text in [*found[1:], ("", "")]]
    return [(code, shown) for (kind, code), shown in zip(found, below) if kind == "python"]


def run(page: Path) -> list[tuple[str, str]]:
    """What each block of a page prints, beside what it shows; all run in one namespace."""
    names, outputs = {"__name__": "__main__"}, []
    for code, shown in blocks(page):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), names)
        outputs.append((printed.getvalue(), shown))
    return outputs


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_print_what_they_show(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    results = run(page)
    torch.random.set_rng_state(state)
    for printed, shown in results:
        assert printed == shown


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state(read_golden(ROOT / "tests" / "goldens" / "swin_tiny.json"))
    torch.save({"model": state}, "swin_tiny_patch4_window7_224.pth")
    readme = ROOT / "README.md"
    (printed, _), = run(readme)
    said = re.search(r"print\(model.load_report\)  # (.*?), \.\.\.\)", readme.read_text(encoding="utf-8"))
    assert printed.startswith(said[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_that_pages_import_exist(page):
    for code, _ in blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "saccade":
                module = import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name} imports {missing} from {node.module}"
