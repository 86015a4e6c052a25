"""The ledger of quirks is complete, points to what is there, and its measured effects are true."""

from __future__ import annotations

import ast
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch

from saccade.golden import make_inputs, make_state, read_golden
from saccade.tools.catalog import cards
from saccade.tools.errata import page, read
from tests.test_goldens import CLAIMED, MODELS, PATHS

QUIRKS = read()
MEASURED = [pytest.param(quirk, id=quirk["paper"], marks=[pytest.mark.slow] if quirk["goldens"][0] in MODELS else [])
            for quirk in QUIRKS if "line" in quirk]
PAPERS = Path(__file__).parents[2] / "saccade" / "papers"


def test_every_entry_is_of_a_paper_and_its_goldens():
    known = cards()
    for quirk in QUIRKS:
        assert set(quirk) <= {"paper", "says", "does", "effect", "goldens", "line", "instead"}
        assert quirk["paper"] in known and quirk["does"]
        assert all(golden in PATHS for golden in quirk.get("goldens", [])), quirk
        assert ("line" in quirk) == ("instead" in quirk) == isinstance(quirk.get("effect"), float)
        assert not any("|" in str(value) for key, value in quirk.items() if key not in ("line", "instead"))
    assert [quirk["paper"] for quirk in QUIRKS] == sorted(quirk["paper"] for quirk in QUIRKS)
    assert len({quirk["does"] for quirk in QUIRKS}) == len(QUIRKS)
    shown = page(known)
    assert all(f"| {quirk['does']} |" in shown for quirk in QUIRKS)


def test_every_docstring_that_names_a_quirk_has_an_entry():
    entered = {quirk["paper"] for quirk in QUIRKS}
    named = {file.stem for file in PAPERS.glob("*.py")
             if "Quirk" in (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")}
    assert named <= entered, named - entered


@pytest.mark.parametrize("quirk", MEASURED)
def test_measured_effect(quirk, monkeypatch):
    """The golden's output with one line of the paper's file changed, against the one with the quirk."""
    golden = quirk["goldens"][0]
    kept = answer(quirk["paper"], golden)
    source = (PAPERS / f"{quirk['paper']}.py").read_text(encoding="utf-8")
    assert source.count(quirk["line"]) >= 1, "the line is gone: give the new one"
    name = f"saccade.papers.{quirk['paper']}"
    changed = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, changed)
    monkeypatch.delitem(sys.modules, f"tests.ports.{CLAIMED[golden]}", raising=False)
    exec(compile(source.replace(quirk["line"], quirk["instead"]), name, "exec"), changed.__dict__)
    other = answer(quirk["paper"], golden)
    monkeypatch.delitem(sys.modules, f"tests.ports.{CLAIMED[golden]}")
    change = (kept - other).double().square().mean().sqrt() / kept.double().std()
    assert change.item() == pytest.approx(quirk["effect"], rel=0.05)


def answer(paper, name):
    """The output of a golden that the quirk moves (its first, or the last of an autoencoder)."""
    golden = read_golden(PATHS[name])
    port = import_module(f"tests.ports.{paper}").build(golden)
    with torch.no_grad():
        result = torch.func.functional_call(port.module.eval(), port.rename(make_state(golden)),
                                            port.inputs(make_inputs(golden)))
        outputs = port.outputs(result) if port.outputs else {"out": result}
    return outputs["decoded" if "decoded" in outputs else next(iter(outputs))]
